//! What is worth measuring: sites that may be best for a group with much traffic, if only that were sure.
//!
//! No group is moved to learn something. What is unsure has to promise more before a group goes there ([`super::Delays`]), and where
//! it promises enough, if all goes well, it is asked: a site opens a TCP connection to a server of the group. At most one
//! group in a hundred (and one at least) is asked for in a round.

use flow::{GroupId, Micros, SiteId};

use super::{Delays, Model};
use crate::core::report::Probe;
use crate::solver::Candidate;

/// Candidates of one group that are asked in one round.
const SITES_MAX: usize = 4;
/// Servers of a group that are asked for: those with the most handshakes.
const SERVERS_MAX: usize = 2;
/// A site is hopeful if it were best with a delay that is so many standard deviations less than thought.
const HOPE: f32 = 3.0;
/// A site that is known better than this is not asked, in milliseconds.
const DOUBTFUL_SD_MS: f32 = 1.0;
/// Of so many groups, one may be asked for in a round.
const GROUPS_PER_PROBED: usize = 100;
/// Doubts that one round looks at.
const LOOKED_MAX: usize = 64;
/// Most that one round asks for.
const WISHES_MAX: usize = 512;

/// Which sites are to measure what.
type Wishes = Vec<(SiteId, Probe)>;

/// A group whose best site is in doubt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Doubt {
    /// By its index in the problem.
    pub(crate) group: u32,
    /// Packets per second.
    weight: f32,
    /// What another site may be better by, if all goes well, in milliseconds.
    hope_ms: f32,
    sites: [u8; SITES_MAX],
    len: u8,
}

impl Doubt {
    /// Packets x milliseconds that might be gained.
    fn value(&self) -> f32 {
        self.weight * self.hope_ms
    }

    /// The same with this index of the group.
    pub(crate) fn at(self, group: u32) -> Self {
        Self { group, ..self }
    }

    /// Of a group with these candidates, whose costs do not have doubt in them.
    pub(crate) fn of(
        group: u32,
        weight: f32,
        candidates: impl Iterator<Item = Candidate> + Clone,
        delays: &Delays,
    ) -> Option<Self> {
        let best_ms = candidates.clone().map(|there| there.cost_ms).fold(f32::INFINITY, f32::min);
        let mut hopes = [(0.0_f32, 0_u8); SITES_MAX];
        for there in candidates {
            let sd_ms = delays.variance[usize::from(there.site)].sqrt();
            let hope = best_ms - (there.cost_ms - HOPE * sd_ms);
            if sd_ms < DOUBTFUL_SD_MS || hope <= hopes[SITES_MAX - 1].0 {
                continue;
            }
            hopes[SITES_MAX - 1] = (hope, there.site);
            hopes.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        }
        let len = hopes.iter().filter(|(hope, _)| *hope > 0.0).count();
        let hope_ms = hopes[0].0;
        (len > 0 && (weight * hope_ms).is_finite()).then(|| Self {
            group,
            weight,
            hope_ms,
            sites: hopes.map(|(_, site)| site),
            len: len as u8,
        })
    }
}

/// Sorts doubts so that the last is the most worth to be cleared up.
pub(crate) fn sort(doubts: &mut [Doubt]) {
    doubts.sort_unstable_by(|a, b| a.value().total_cmp(&b.value()).then(b.group.cmp(&a.group)));
}

/// Whom to ask in one round, the most worth first; the doubts that this looks at are taken from the end, so the next round goes on where
/// this one ended.
pub(crate) fn choose(
    model: &Model,
    doubts: &mut Vec<Doubt>,
    group: impl Fn(u32) -> GroupId,
    sites: &[SiteId],
    groups: usize,
    now: Micros,
) -> Wishes {
    let (mut wishes, mut probed) = (Vec::new(), 0);
    let mut valued: Vec<(f32, Doubt, Wishes)> = Vec::new();
    while valued.len() < LOOKED_MAX
        && let Some(doubt) = doubts.pop()
    {
        let Some((gain_ms, asked)) = ask(model, &doubt, &group, sites, now) else { continue };
        valued.push((doubt.weight * gain_ms, doubt, asked));
    }
    valued.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.group.cmp(&b.1.group)));
    let probed_max = (groups / GROUPS_PER_PROBED).clamp(1, LOOKED_MAX);
    for (_, doubt, asked) in valued {
        let before = wishes.len();
        if probed < probed_max && wishes.len() < WISHES_MAX {
            wishes.extend(asked.into_iter().filter(|wish| !wishes.contains(wish)).collect::<Vec<_>>());
        } else {
            doubts.push(doubt);
        }
        probed += usize::from(wishes.len() > before);
    }
    wishes.truncate(WISHES_MAX);
    wishes
}

/// Which servers of a group to measure from where, and what that gains in milliseconds of a round trip.
fn ask(
    model: &Model,
    doubt: &Doubt,
    group: &impl Fn(u32) -> GroupId,
    sites: &[SiteId],
    now: Micros,
) -> Option<(f32, Wishes)> {
    let (mut gain_ms, mut asked) = (0.0_f32, Vec::new());
    let known = model.known(&group(doubt.group));
    for (number, _) in known.into_iter().flat_map(|known| known.talk.iter().take(SERVERS_MAX)) {
        let probe = |site: usize| {
            let site = *sites.get(site)?;
            let (prefix, target) = model.target(*number, site, now)?;
            Some((site, Probe { prefix, target }))
        };
        let next = model.thoughts.next(*number, |site| probe(site).is_some());
        if let Some((site, gain)) = next {
            gain_ms = gain_ms.max(gain);
            asked.extend(probe(site));
        }
        // What was measured long ago is measured again; where nothing tells which site to ask first, all that give hope.
        let again = |(site, probe): &(SiteId, Probe)| {
            next.is_none() || model.servers.is_measured(&probe.prefix, *site)
        };
        let hopeful = doubt.sites[..usize::from(doubt.len)].iter().map(|site| usize::from(*site));
        let hopeful: Vec<_> = hopeful.filter_map(probe).filter(again).collect();
        if !hopeful.is_empty() {
            gain_ms = gain_ms.max(doubt.hope_ms);
        }
        asked.extend(hopeful);
    }
    (!asked.is_empty()).then_some((gain_ms, asked))
}
