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
const HOPE: f32 = 1.5;
/// A site that is known better than this is not asked, in milliseconds.
const DOUBTFUL_SD_MS: f32 = 1.0;
/// Of so many groups, one may be asked for in a round.
const GROUPS_PER_PROBED: usize = 100;
/// Most that one round asks for.
const WISHES_MAX: usize = 512;

/// A group whose best site is in doubt.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Doubt {
    /// By its index in the problem.
    pub(crate) group: u32,
    /// Packets x milliseconds that might be gained.
    pub(crate) value: f32,
    sites: [u8; SITES_MAX],
    len: u8,
}

impl Doubt {
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
        let value = weight * hopes[0].0;
        (len > 0 && value.is_finite()).then(|| Self {
            group,
            value,
            sites: hopes.map(|(_, site)| site),
            len: len as u8,
        })
    }
}

/// Sorts doubts so that the last is the most worth to be cleared up.
pub(crate) fn sort(doubts: &mut [Doubt]) {
    doubts.sort_unstable_by(|a, b| a.value.total_cmp(&b.value).then(b.group.cmp(&a.group)));
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
) -> Vec<(SiteId, Probe)> {
    let (mut wishes, mut probed) = (Vec::new(), 0);
    while probed < (groups / GROUPS_PER_PROBED).max(1)
        && wishes.len() < WISHES_MAX
        && let Some(doubt) = doubts.pop()
    {
        let before = wishes.len();
        let known = model.known(&group(doubt.group));
        for (number, _) in known.into_iter().flat_map(|known| known.talk.iter().take(SERVERS_MAX)) {
            for site in &doubt.sites[..usize::from(doubt.len)] {
                let Some(site) = sites.get(usize::from(*site)).copied() else { continue };
                let probe = model.target(*number, site, now).map(|(prefix, target)| Probe { prefix, target });
                wishes.extend(probe.map(|probe| (site, probe)).filter(|wish| !wishes.contains(wish)));
            }
        }
        probed += usize::from(wishes.len() > before);
    }
    wishes.truncate(WISHES_MAX);
    wishes
}
