//! What a fault excuses, as docs/design.md and docs/operations.md have it, and whom. All else that comes to harm is a failure.
//!
//! | fault | who | what | why |
//! |---|---|---|---|
//! | switch killed, stopped or ended | packets that come in, are served or go out there | lost | it carries nothing meanwhile |
//! | switch stopped for longer than `moves.late_ms` | the same, of groups that move | order | a target waits for what stands in its queue for so long and no longer |
//! | worker killed or ended | groups of its site, or on their way to or from there | lost, order, connections | its table, its queue and what it held die with it; others take its groups over without their flows |
//! | worker killed or ended | groups on their way to its site, after the move was taken back | lost | it holds their packets until its own agent, which may be gone, tells it that the move is over |
//! | worker stopped | the same | lost, order; connections if for long | its queue is bounded; after five seconds it is taken for dead |
//! | data path between two sites cut | packets whose clients, servers or owners are at both | lost; order while a move is in hand | what is on its way is lost, and so are markers and cuts |
//! | data path slow | the same, groups that move | order | the direct path is slower than the detour over the new owner |
//! | switch stopped when one of these begins, or before it is over | what either holds up | the same, from when the first begins until the last is over | it waits in one, then in the other |
//! | the machine late while a group moves, by more than the detour over the new owner is | its packets, also when all is calm | order | what the old owner sent last goes straight, what the new one sends first waits for the cut |
//! | the kernel let datagrams go at full sockets (`RcvbufErrors`), as a switch that goes on sends faster than the next one reads | what was sent up to 3 s before, no more than it counted | lost | loopback has no back pressure |
//! | any of these at the target of a move | what was sent since the move began | the same | it may have waited there for all that time |
//! | worker killed or ended while the agent of an ingress is away | what that ingress sends | lost until that agent is back | it sends to the old owner's worker, which relays no more |
//! | agent away while a group moves | the group, when that agent is back | order | nobody waited for its ingress, whose direct packets overtake those that are relayed |
//! | move between sites of a relaxed service | its group | order | that is what the service is for; moves between workers are strict |
//! | move taken back | its group, until the target's agent has heard of it | order | what the target held comes back behind what is served meanwhile |
//! | long outage of a path | its groups | connections | TCP gives up after 30 s |
//!
//! Placement nodes, control links and controllers that die, stop or are cut excuse nothing by themselves, and agents nothing but that order. Nothing excuses a
//! duplicate, a wrong byte, or a packet for somebody else.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::watch::{MoveSeen, Seen};
use flow::{Prefix, SiteId};
use limosa::demo::built_in;
use limosa::demo::cluster::Part;
use limosa::demo::wan::great_circle_delay;

/// What was sent shortly before the fault may still have been on its way.
pub(crate) const BEFORE: Duration = Duration::from_millis(1_500);
/// What was sent until it was over may have met it, echoes included.
const AFTER: Duration = Duration::from_millis(1_500);
/// A former owner relays for ten seconds.
const RELAYS: Duration = Duration::from_secs(12);
/// What a target held may wait for so long after its move was taken back: until an agent that was killed or stopped is back.
const HELD: Duration = Duration::from_secs(30);
/// An agent that is ready again asks each placement node for a second at most what it has missed.
const CATCHES_UP: Duration = Duration::from_secs(3);
/// TCP gives up after thirty seconds of silence, and tries again.
const TCP_GIVES_UP: Duration = Duration::from_secs(50);
/// An outage that TCP may not survive, as its pauses grow with each try.
const OUTAGE: Duration = Duration::from_secs(8);
/// What stands in the queue of a switch is waited for by a target for two seconds (`moves.late_ms`), from its first packet on.
pub(crate) const WAITED_FOR: Duration = Duration::from_millis(1_800);
/// A worker that is stopped for longer may be taken for dead.
pub(crate) const TAKEN_FOR_DEAD: Duration = Duration::from_secs(4);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touches {
    /// What goes through the site's switch.
    Through(SiteId),
    /// What a worker of the site serves.
    ServedAt(SiteId),
    /// What goes between two sites.
    Across(SiteId, SiteId),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Excuse {
    pub(crate) touches: Touches,
    pub(crate) from: Duration,
    /// Open while the fault, or what it left behind, goes on.
    pub(crate) until: Option<Duration>,
    /// Packets may be lost.
    pub(crate) loses: bool,
    /// Flows, and so connections, may be lost.
    pub(crate) forgets: bool,
    /// Order may be lost: always, or only in moves.
    pub(crate) shuffles: bool,
    pub(crate) shuffles_moves: bool,
    /// Packets that come meanwhile wait until it is over: a switch that is stopped.
    pub(crate) holds_up: bool,
}

impl Excuse {
    fn end(&self) -> Duration {
        self.until.unwrap_or(Duration::MAX)
    }

    /// The time in which packets of a group may come to harm: until moves that the fault met have ended, from when they began.
    fn window(&self, group: Prefix, seen: &Seen) -> (Duration, Duration) {
        let mut window = (self.from.saturating_sub(BEFORE), self.end().saturating_add(AFTER));
        if let Touches::ServedAt(site) = self.touches {
            for one in
                seen.moves_of(group, self.from, self.end()).filter(|one| one.from == site || one.to == site)
            {
                window.0 = window.0.min(one.begun);
                window.1 = window.1.max(one.ended.unwrap_or(Duration::MAX).saturating_add(AFTER));
            }
        }
        window
    }

    /// The times of moves to a site that the fault reaches, in hand or taken back a while before: what it held of them may still have been
    /// there, and meets the fault when it is let go, however long ago it was sent.
    fn held<'a>(
        &self,
        group: Prefix,
        seen: &'a Seen,
    ) -> impl Iterator<Item = (Duration, Duration)> + use<'a> {
        let (touches, from) = (self.touches, self.from);
        let reached = move |site: SiteId| match touches {
            Touches::Through(one) | Touches::ServedAt(one) => one == site,
            Touches::Across(a, b) => a == site || b == site,
        };
        let in_hand = move |one: &MoveSeen| one.ended.is_none_or(|ended| ended.saturating_add(AFTER) >= from);
        let held = move |one: &&MoveSeen| reached(one.to) && (one.state == "taken_back" || in_hand(one));
        seen.moves_of(group, from.saturating_sub(HELD), self.end())
            .filter(held)
            .map(|one| (one.begun, let_go(one, seen)))
    }

    fn reaches(&self, sites: &BTreeSet<SiteId>, ends: &[SiteId]) -> bool {
        let through = |site: &SiteId| sites.contains(site) || ends.contains(site);
        match self.touches {
            Touches::Through(site) => through(&site),
            Touches::ServedAt(site) => sites.contains(&site),
            Touches::Across(a, b) => through(&a) && through(&b),
        }
    }
}

/// Until when packets may go to the target of a move, and wait there: until its end, and if that was taken back while its agent was away,
/// until that has caught up.
fn let_go(one: &MoveSeen, seen: &Seen) -> Duration {
    let Some(ended) = one.ended else { return Duration::MAX };
    let back = seen.ready_from(Part::Agent(one.to), ended).unwrap_or(ended);
    if one.state == "taken_back" && back > ended.saturating_add(AFTER) {
        return back.saturating_add(CATCHES_UP);
    }
    ended.saturating_add(AFTER)
}

/// By how much the way from the old owner over the new one to an end is longer than the straight one.
fn detour(one: &MoveSeen, end: SiteId) -> Duration {
    (between(one.from, one.to) + between(one.to, end)).saturating_sub(between(one.from, end))
}

/// One way between two sites of the deployment.
fn between(a: SiteId, b: SiteId) -> Duration {
    let sites = built_in();
    let place = |site: SiteId| {
        let site = &sites[usize::from(site.0) - 1];
        (site.latitude, site.longitude)
    };
    great_circle_delay(place(a), place(b))
}

/// Where a group's clients come in.
pub(crate) type Home = fn(Prefix) -> SiteId;
/// Whether a group's packets may pass one another in moves between sites, by its service.
pub(crate) type Relaxed = fn(Prefix) -> bool;

/// Packets that came to harm: whose, and when they were sent.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Harmed {
    pub(crate) group: Prefix,
    /// Where the server is near.
    pub(crate) server: SiteId,
    pub(crate) from: Duration,
    pub(crate) until: Duration,
}

pub(crate) struct Judge<'a> {
    pub(crate) excuses: &'a [Excuse],
    pub(crate) seen: &'a Seen,
    pub(crate) home: Home,
    pub(crate) relaxed: Relaxed,
}

impl Judge<'_> {
    /// Until when packets may have been under way: what waits at the target of a move goes on when that lets it go, and meets what is
    /// the matter then, wherever on its way.
    fn under_way_until(&self, harm: &Harmed) -> Duration {
        let moves = self.seen.moves_of(harm.group, harm.from.saturating_sub(HELD), harm.until);
        let let_go = moves.map(|one| let_go(one, self.seen)).filter(|let_go| *let_go >= harm.from);
        let latest = let_go.max().unwrap_or_default().min(harm.from.saturating_add(HELD));
        latest.max(harm.until)
    }

    /// When an agent at the ends is back that was away when the excuse ended: till then its ingress goes on sending to where a
    /// group was, and a worker that had relayed there is another one.
    fn flips_late(&self, excuse: &Excuse, ends: &[SiteId]) -> Duration {
        let back = |site: &SiteId| self.seen.ready_from(Part::Agent(*site), excuse.end());
        let late = |back: &Duration| *back > excuse.end().saturating_add(AFTER);
        let latest = ends.iter().filter_map(back).filter(late).max();
        latest.map_or(excuse.end(), |back| back.saturating_add(CATCHES_UP))
    }

    /// The time of a fault and of switches that are stopped around it: what one of them holds up meets the other when it is let go.
    fn with_what_waits(
        &self,
        (mut from, mut until): (Duration, Duration),
        sites: &BTreeSet<SiteId>,
        ends: &[SiteId],
    ) -> (Duration, Duration) {
        let stops = self.excuses.iter().filter(|other| other.holds_up && other.reaches(sites, ends));
        let stops: Vec<(Duration, Duration)> = stops.map(|other| (other.from, other.end())).collect();
        loop {
            let meets = |(begin, end): &&(Duration, Duration)| {
                *begin <= until.saturating_add(AFTER) && from <= end.saturating_add(AFTER)
            };
            let (begin, end) = stops
                .iter()
                .filter(meets)
                .fold((from, until), |(begin, end), stop| (begin.min(stop.0), end.max(stop.1)));
            if (begin, end) == (from, until) {
                return (from, until);
            }
            (from, until) = (begin, end);
        }
    }

    fn covers(&self, harm: &Harmed, wanted: impl Fn(&Excuse) -> bool) -> bool {
        let (from, until) = (harm.from, self.under_way_until(harm));
        let ends = [(self.home)(harm.group), harm.server];
        // An ingress whose agent is away sends to where the group was when that went.
        let gone =
            |at: Duration| ends.iter().filter_map(move |end| self.seen.gone_since(Part::Agent(*end), at));
        let gone = gone(from).chain(gone(from.saturating_sub(CATCHES_UP))).min().unwrap_or(from);
        let since = gone.min(from).saturating_sub(RELAYS);
        let sites = self.seen.sites_of(harm.group, since, until.saturating_add(AFTER));
        self.excuses.iter().filter(|excuse| wanted(excuse)).any(|excuse| {
            let waits = self.with_what_waits((excuse.from, excuse.end()), &sites, &ends);
            let mut window = excuse.window(harm.group, self.seen);
            window.0 = window.0.min(waits.0.saturating_sub(BEFORE));
            window.1 = window.1.max(waits.1.saturating_add(AFTER));
            let late = matches!(excuse.touches, Touches::ServedAt(_)) && excuse.forgets;
            let late = late.then(|| (excuse.from, self.flips_late(excuse, &ends)));
            let mut windows = std::iter::once(window).chain(late).chain(excuse.held(harm.group, self.seen));
            windows.any(|(begin, end)| begin <= until && from <= end) && excuse.reaches(&sites, &ends)
        })
    }

    pub(crate) fn may_lose(&self, harm: &Harmed) -> bool {
        self.covers(harm, |excuse| excuse.loses)
    }

    pub(crate) fn may_shuffle(&self, harm: &Harmed) -> bool {
        let (from, until) = (harm.from.saturating_sub(RELAYS), harm.until);
        let moves = |until: Duration| self.seen.moves_of(harm.group, from, until.saturating_add(AFTER));
        // What met the fault is on its way until that is over, and so may meet a move that begins meanwhile.
        let met = |excuse: &Excuse| moves(until.max(excuse.end())).next().is_some();
        let mut held = self.seen.moves_of(harm.group, harm.from.saturating_sub(HELD), until);
        moves(until).any(|one| one.state == "taken_back")
            || self.may_pass(harm)
            || self.outran_the_detour(harm)
            || self.was_flipped_late(harm)
            || held.any(|one| one.state == "taken_back" && let_go(one, self.seen) >= harm.from)
            || self.covers(harm, |excuse| excuse.shuffles || excuse.shuffles_moves && met(excuse))
    }

    /// Whether its packets may pass one another because its service lets them, while it moves between sites.
    pub(crate) fn may_pass(&self, harm: &Harmed) -> bool {
        let (from, until) = (harm.from.saturating_sub(BEFORE), harm.until.saturating_add(AFTER));
        (self.relaxed)(harm.group) && self.seen.moves_of(harm.group, from, until).next().is_some()
    }

    /// Whether the machine was late by more than the detour over the new owner is longer than the old one's straight way: whichever it
    /// delays comes last. A server beside the new owner has no such detour; a client there is reached by the tunnel that the cut
    /// takes.
    pub(crate) fn outran_the_detour(&self, harm: &Harmed) -> bool {
        let (from, until) = (harm.from.saturating_sub(BEFORE), harm.until.saturating_add(AFTER));
        let (late, home) = (self.seen.worst_lag(from, until), (self.home)(harm.group));
        self.seen.moves_of(harm.group, from, until).any(|one| {
            let to_server = late > detour(one, harm.server);
            to_server || home != one.to && late > detour(one, home)
        })
    }

    /// Whether workers of a site that had the group opened holds early just then, and counted it. That explains nothing away, but tells where to
    /// look.
    pub(crate) fn was_let_go_early(&self, harm: &Harmed) -> bool {
        let (from, until) = (harm.from.saturating_sub(AFTER), harm.until.saturating_add(WAITED_FOR + AFTER));
        let sites = self.seen.sites_of(harm.group, from.saturating_sub(RELAYS), until);
        self.seen.opened_early(&sites, from, until)
    }

    /// Whether an ingress flipped just then whose agent had been away while the group moved: nobody had waited for it.
    fn was_flipped_late(&self, harm: &Harmed) -> bool {
        let ends = [(self.home)(harm.group), harm.server];
        let around = (harm.from.saturating_sub(CATCHES_UP), harm.until.saturating_add(AFTER));
        ends.iter().any(|site| {
            let away = self.seen.away(Part::Agent(*site), around.0, around.1);
            away.is_some_and(|(from, back)| {
                self.seen.moves_of(harm.group, from.saturating_sub(RELAYS), back).next().is_some()
            })
        })
    }

    /// A connection of the group broke at a time: flows were lost, or all the time that its path was not there is long.
    pub(crate) fn may_break(&self, group: Prefix, at: Duration) -> bool {
        let from = at.saturating_sub(TCP_GIVES_UP);
        let sites = self.seen.sites_of(group, from, at);
        // Its server may be anywhere.
        let ends = [SiteId(1), SiteId(2), SiteId(3)];
        let mut outage = Duration::ZERO;
        for excuse in self.excuses.iter().filter(|excuse| excuse.reaches(&sites, &ends)) {
            let (begin, end) = excuse.window(group, self.seen);
            if begin > at || end < from {
                continue;
            }
            if excuse.forgets {
                return true;
            }
            if excuse.loses {
                outage += end.min(at).saturating_sub(begin.max(from));
            }
        }
        outage >= OUTAGE
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const AMSTERDAM: SiteId = SiteId(1);
    const VIRGINIA: SiteId = SiteId(2);
    const SINGAPORE: SiteId = SiteId(3);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Two groups of clients at Amsterdam; the second moves to Virginia from 100 s to 104 s.
    fn seen() -> Seen {
        seen_that_ends("done")
    }

    fn seen_that_ends(state: &str) -> Seen {
        let mut seen = Seen::default();
        let groups =
            [0, 1].map(|nth| json!({ "group": format!("1:100.64.{nth}.0/24"), "owner": "amsterdam" }));
        seen.add_owners(&json!({ "groups": groups }), at(0));
        let mut one = json!({
            "id": 7, "group": "1:100.64.1.0/24", "from": "amsterdam", "to": "virginia", "state": "preparing", "ended": null
        });
        seen.add_moves(&json!({ "moves": [one] }), at(101), at(101));
        one["ended"] = json!(9);
        one["state"] = json!(state);
        seen.add_moves(&json!({ "moves": [one] }), at(104), at(104));
        seen
    }

    fn excuse(touches: Touches, from: u64, until: u64) -> Excuse {
        let until = Some(at(until));
        let (loses, forgets, shuffles, shuffles_moves, holds_up) = (true, true, false, true, false);
        Excuse { touches, from: at(from), until, loses, forgets, shuffles, shuffles_moves, holds_up }
    }

    fn harmed(nth: u8, server: SiteId, from: u64) -> Harmed {
        let group = format!("100.64.{nth}.0/24").parse().unwrap();
        Harmed { group, server, from: at(from), until: at(from) + Duration::from_millis(500) }
    }

    fn with<T>(excuses: &[Excuse], look: impl FnOnce(&Judge<'_>) -> T) -> T {
        with_seen(&seen(), excuses, look)
    }

    fn with_seen<T>(seen: &Seen, excuses: &[Excuse], look: impl FnOnce(&Judge<'_>) -> T) -> T {
        look(&Judge { excuses, seen, home: |_| AMSTERDAM, relaxed: |_| false })
    }

    #[test]
    fn a_switch_excuses_what_goes_through_it_while_it_is_gone() {
        with(&[excuse(Touches::Through(SINGAPORE), 50, 55)], |judge| {
            assert!(judge.may_lose(&harmed(0, SINGAPORE, 52)));
            assert!(!judge.may_lose(&harmed(0, VIRGINIA, 52)), "it goes elsewhere");
            assert!(!judge.may_lose(&harmed(0, SINGAPORE, 45)) && !judge.may_lose(&harmed(0, SINGAPORE, 58)));
        });
    }

    #[test]
    fn a_worker_excuses_what_its_site_serves_and_moves_that_it_is_in_from_their_begin_to_their_end() {
        with(&[excuse(Touches::ServedAt(VIRGINIA), 103, 103)], |judge| {
            assert!(!judge.may_lose(&harmed(0, VIRGINIA, 103)), "Amsterdam serves it");
            assert!(judge.may_lose(&harmed(1, SINGAPORE, 100)) && judge.may_lose(&harmed(1, SINGAPORE, 105)));
            assert!(
                !judge.may_lose(&harmed(1, SINGAPORE, 97)) && !judge.may_lose(&harmed(1, SINGAPORE, 107))
            );
        });
    }

    /// It echoes what it gets as if it were new, so that the echo is late as well.
    #[test]
    fn what_a_stopped_worker_lets_go_waits_once_more_in_a_switch_that_is_stopped_by_then() {
        let stopped = Excuse { shuffles: true, ..excuse(Touches::ServedAt(AMSTERDAM), 58, 66) };
        let switch =
            |site, from, until| Excuse { holds_up: true, ..excuse(Touches::Through(site), from, until) };
        let may_shuffle =
            |excuses: &[Excuse], from| with(excuses, |judge| judge.may_shuffle(&harmed(0, SINGAPORE, from)));
        assert!(may_shuffle(&[stopped], 65) && !may_shuffle(&[stopped], 70));
        assert!(may_shuffle(&[stopped, switch(AMSTERDAM, 66, 70)], 70));
        assert!(
            may_shuffle(&[stopped, switch(AMSTERDAM, 66, 70), switch(SINGAPORE, 69, 75)], 75),
            "and on its way"
        );
        assert!(!may_shuffle(&[stopped, switch(VIRGINIA, 66, 70)], 70), "it goes elsewhere");
        assert!(!may_shuffle(&[stopped, switch(AMSTERDAM, 69, 72)], 72), "all had gone on by then");
        assert!(!may_shuffle(&[switch(AMSTERDAM, 66, 70)], 68), "a switch alone keeps the order");
        let late = [switch(AMSTERDAM, 50, 58), stopped];
        assert!(may_shuffle(&late, 51), "it comes to a worker that is stopped by then");
        assert!(!may_shuffle(&late, 47), "it had gone on before");
        let killed = Excuse { holds_up: false, ..switch(AMSTERDAM, 66, 70) };
        assert!(!may_shuffle(&[stopped, killed], 70), "what waited there is lost");
    }

    #[test]
    fn a_machine_that_is_late_by_more_than_the_detour_may_change_the_order_of_what_moves() {
        let mut seen = seen();
        let may_shuffle = |seen: &Seen, nth, server, from| {
            with_seen(seen, &[], |judge| judge.may_shuffle(&harmed(nth, server, from)))
        };
        assert!(!may_shuffle(&seen, 1, VIRGINIA, 102), "the machine was not late");
        seen.note_late(at(102), Duration::from_millis(3));
        assert!(may_shuffle(&seen, 1, VIRGINIA, 102), "the server is beside the new owner");
        assert!(!may_shuffle(&seen, 1, SINGAPORE, 102), "the way over the new owner is much longer");
        assert!(!may_shuffle(&seen, 0, VIRGINIA, 102), "it does not move");
        assert!(!may_shuffle(&seen, 1, VIRGINIA, 110), "the move is long over");
        seen.note_late(at(102), Duration::from_millis(120));
        assert!(may_shuffle(&seen, 1, SINGAPORE, 102));
    }

    #[test]
    fn a_relaxed_service_promises_order_but_in_moves_between_sites_and_every_packet_always() {
        let seen = seen();
        let judge = Judge { excuses: &[], seen: &seen, home: |_| AMSTERDAM, relaxed: |_| true };
        let harm = harmed(1, SINGAPORE, 102);
        assert!(judge.may_shuffle(&harm) && !judge.may_lose(&harm) && !judge.may_break(harm.group, at(102)));
        assert!(!judge.may_shuffle(&harmed(1, SINGAPORE, 95)), "the move has not begun");
        assert!(!judge.may_shuffle(&harmed(1, SINGAPORE, 108)), "the move is over");
        assert!(!judge.may_shuffle(&harmed(0, SINGAPORE, 102)), "it does not move");
    }

    #[test]
    fn a_worker_that_dies_takes_what_it_held_of_a_move_that_was_taken_back() {
        let killed = excuse(Touches::ServedAt(VIRGINIA), 115, 116);
        with_seen(&seen_that_ends("taken_back"), &[killed], |judge| {
            assert!(judge.may_lose(&harmed(1, SINGAPORE, 102)), "it waited at Virginia");
            assert!(!judge.may_lose(&harmed(1, SINGAPORE, 108)), "Amsterdam serves again");
            assert!(!judge.may_lose(&harmed(0, SINGAPORE, 102)), "it never moved");
        });
        with(&[killed], |judge| {
            assert!(!judge.may_lose(&harmed(1, SINGAPORE, 102)), "nothing is held after its end")
        });
        let cut = excuse(Touches::Across(VIRGINIA, SINGAPORE), 115, 116);
        with_seen(&seen_that_ends("taken_back"), &[cut], |judge| {
            assert!(judge.may_lose(&harmed(1, SINGAPORE, 102)), "it comes back over the path that is cut");
        });
        let late = excuse(Touches::ServedAt(VIRGINIA), 140, 141);
        with_seen(&seen_that_ends("taken_back"), &[late], |judge| {
            assert!(!judge.may_lose(&harmed(1, SINGAPORE, 102)))
        });
    }

    #[test]
    fn what_a_target_holds_meets_what_befalls_its_switch_though_it_was_sent_long_before() {
        with(&[excuse(Touches::Through(VIRGINIA), 103, 103)], |judge| {
            assert!(judge.may_lose(&harmed(1, SINGAPORE, 100)), "it waited at Virginia since the move began");
            assert!(
                !judge.may_lose(&harmed(1, SINGAPORE, 98)) && !judge.may_lose(&harmed(0, SINGAPORE, 100))
            );
        });
    }

    #[test]
    fn a_target_whose_agent_is_away_may_hold_until_that_is_back() {
        let mut seen = seen_that_ends("taken_back");
        for second in (90..101).chain(120..130) {
            seen.note_ready(Part::Agent(VIRGINIA), at(second), true);
        }
        with_seen(&seen, &[], |judge| {
            assert!(judge.may_shuffle(&harmed(1, SINGAPORE, 121)), "the agent is back and catches up");
            assert!(
                !judge.may_shuffle(&harmed(1, SINGAPORE, 124))
                    && !judge.may_shuffle(&harmed(0, SINGAPORE, 121))
            );
        });
    }

    #[test]
    fn what_a_target_holds_meets_what_befalls_any_place_on_its_way_when_it_is_let_go() {
        let mut seen = seen_that_ends("taken_back");
        for second in (90..101).chain(110..130) {
            seen.note_ready(Part::Agent(VIRGINIA), at(second), true);
        }
        with_seen(&seen, &[excuse(Touches::Through(SINGAPORE), 112, 114)], |judge| {
            assert!(judge.may_lose(&harmed(1, SINGAPORE, 103)), "it waits until the agent is back");
            assert!(
                !judge.may_lose(&harmed(1, VIRGINIA, 103)) && !judge.may_lose(&harmed(0, SINGAPORE, 103))
            );
        });
    }

    #[test]
    fn an_ingress_whose_agent_is_away_flips_out_of_order_and_knows_no_other_worker() {
        let mut seen = seen();
        for second in (90..100).chain(120..130) {
            seen.note_ready(Part::Agent(SINGAPORE), at(second), true);
        }
        with_seen(&seen, &[], |judge| {
            assert!(
                judge.may_shuffle(&harmed(1, SINGAPORE, 120))
                    && !judge.may_shuffle(&harmed(1, SINGAPORE, 125))
            );
            assert!(!judge.may_shuffle(&harmed(1, VIRGINIA, 120)), "it does not come in there");
            assert!(!judge.may_shuffle(&harmed(0, SINGAPORE, 120)), "it did not move");
        });
        with_seen(&seen, &[excuse(Touches::ServedAt(AMSTERDAM), 106, 107)], |judge| {
            assert!(judge.may_lose(&harmed(1, SINGAPORE, 115)), "the old owner's worker relays no more");
            let long_ago = "though that was longer ago than it relays otherwise";
            assert!(judge.may_lose(&harmed(1, SINGAPORE, 119)), "{long_ago}");
            assert!(
                !judge.may_lose(&harmed(1, VIRGINIA, 115)) && !judge.may_lose(&harmed(1, SINGAPORE, 125))
            );
        });
    }

    #[test]
    fn what_stands_in_the_queue_of_a_stopped_switch_may_meet_a_move_that_begins_meanwhile() {
        let stop = excuse(Touches::Through(SINGAPORE), 90, 102);
        with(&[stop], |judge| {
            assert!(
                judge.may_shuffle(&harmed(1, SINGAPORE, 91)),
                "it waits until 102 s, and a move began at 100 s"
            );
            assert!(!judge.may_shuffle(&harmed(0, SINGAPORE, 91)), "it never moved");
        });
        with(&[excuse(Touches::Through(SINGAPORE), 90, 95)], |judge| {
            assert!(!judge.may_shuffle(&harmed(1, SINGAPORE, 91)), "it went on before the move");
        });
    }

    #[test]
    fn a_path_excuses_what_has_ends_at_both_sites_and_order_only_in_moves() {
        with(&[excuse(Touches::Across(AMSTERDAM, SINGAPORE), 102, 103)], |judge| {
            assert!(judge.may_lose(&harmed(0, SINGAPORE, 102)) && !judge.may_lose(&harmed(0, VIRGINIA, 102)));
            assert!(
                judge.may_shuffle(&harmed(1, SINGAPORE, 102))
                    && !judge.may_shuffle(&harmed(0, SINGAPORE, 102))
            );
        });
    }

    #[test]
    fn a_hold_that_was_opened_early_is_told_of_its_site_and_excuses_nothing() {
        let mut seen = seen();
        seen.note_opened(AMSTERDAM, (at(40), at(41)));
        seen.note_opened(SINGAPORE, (at(50), at(51)));
        with_seen(&seen, &[], |judge| {
            let told = |from| judge.was_let_go_early(&harmed(0, AMSTERDAM, from));
            assert!(told(40) && told(38) && !told(34) && !told(45) && !told(50));
            assert!(!judge.may_shuffle(&harmed(0, AMSTERDAM, 40)));
        });
    }

    #[test]
    fn nothing_is_excused_without_a_fault() {
        with(&[], |judge| {
            let harm = harmed(1, VIRGINIA, 102);
            assert!(!judge.may_lose(&harm) && !judge.may_shuffle(&harm));
            assert!(!judge.may_break(harm.group, at(102)));
        });
    }

    #[test]
    fn a_connection_may_break_after_flows_were_lost_or_a_long_outage() {
        let group = harmed(0, AMSTERDAM, 0).group;
        with(&[excuse(Touches::ServedAt(AMSTERDAM), 10, 11)], |judge| {
            assert!(judge.may_break(group, at(40)) && !judge.may_break(group, at(80)));
        });
        let outage = |until| Excuse { forgets: false, ..excuse(Touches::Through(AMSTERDAM), 10, until) };
        with(&[outage(12)], |judge| assert!(!judge.may_break(group, at(40)), "TCP outlives it"));
        with(&[outage(30)], |judge| assert!(judge.may_break(group, at(40))));
    }
}
