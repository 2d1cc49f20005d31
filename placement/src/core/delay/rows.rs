//! Rows of delays by site, so that a group costs a few sums of them: from each site to all, and from all over a server prefix and
//! back. They own what they say and can be kept while reports go on to come in.

use flow::{GroupId, Micros, SiteId};

use super::{Guess, Known, Leg, Model};
use crate::core::model::Site;
use crate::solver::SITES_MAX;

/// A group's delay at every site in milliseconds, and the variance that differs between sites.
#[derive(Debug, Default)]
pub(crate) struct Delays {
    pub(crate) ms: Vec<f32>,
    pub(crate) variance: Vec<f32>,
}

/// Standard deviations that a site has to promise more if it is less surely known than where the group is.
const DOUBT: f32 = 0.3;

impl Delays {
    /// What a site has to promise beyond the present one, in milliseconds, by as much as it is less surely known. What both have in
    /// common, such as the access line or a server that nobody measured, is in neither.
    pub(crate) fn doubt_ms(&self, present: u8, site: u8) -> f32 {
        let variance = |site: u8| self.variance.get(usize::from(site)).copied().unwrap_or(0.0);
        doubt_ms(variance(present), variance(site))
    }

    /// Adds that of every site to its cost.
    pub(crate) fn add_doubts(&self, present: u8, costs: &mut [f32]) {
        let here = self.variance.get(usize::from(present)).copied().unwrap_or(0.0);
        let sites = costs.iter_mut().zip(&self.variance);
        sites.for_each(|(cost, there)| *cost += doubt_ms(here, *there));
    }
}

fn doubt_ms(here: f32, there: f32) -> f32 {
    DOUBT * (there - here).max(0.0).sqrt()
}

/// Where a share of a group's packets goes.
pub(super) enum End {
    /// A server prefix with this row.
    Row(u32),
    /// A server that is taken to be at this ingress.
    Ingress(u8),
}

/// Delays between all sites, and of server prefixes.
pub(crate) struct Rows {
    pub(crate) sites: Vec<Site>,
    pub(crate) index: [Option<u8>; SITES_MAX],
    /// From each site to all.
    ms: Vec<f32>,
    variance: Vec<f32>,
    /// By number of the server prefix; `u32::MAX` where there is no row.
    row_of: Vec<u32>,
    /// By row: where the packets of the server come in.
    homes: Vec<u8>,
    row_ms: Vec<f32>,
    row_variance: Vec<f32>,
}

impl Rows {
    /// By the ways between all sites, row by row; of servers none yet.
    pub(super) fn new(sites: Vec<Site>, legs: &[Leg], servers: usize) -> Self {
        let mut index = [None; SITES_MAX];
        for (site, n) in sites.iter().zip(0..=u8::MAX) {
            index[usize::from(site.id.0)] = Some(n);
        }
        Self {
            sites,
            index,
            ms: legs.iter().map(|leg| leg.ms as f32).collect(),
            variance: legs.iter().map(|leg| leg.variance() as f32).collect(),
            row_of: vec![u32::MAX; servers],
            homes: Vec::new(),
            row_ms: Vec::new(),
            row_variance: Vec::new(),
        }
    }

    /// The row of a server prefix: one guess per site.
    pub(super) fn add(&mut self, number: u32, home: u8, guesses: impl Iterator<Item = Guess>) {
        self.row_of[number as usize] = self.homes.len() as u32;
        self.homes.push(home);
        for guess in guesses {
            self.row_ms.push(guess.ms as f32);
            self.row_variance.push(guess.variance as f32);
        }
    }

    /// The number of the server prefix that has a row, and its home.
    pub(super) fn server_of(&self, row: u32) -> (u32, u8) {
        let number = self.row_of.iter().position(|known| *known == row).unwrap_or(0);
        (number as u32, self.homes[row as usize])
    }

    /// The way from one site to all, in milliseconds.
    pub(super) fn ms_from(&self, site: usize) -> &[f32] {
        &self.ms[site * self.len()..(site + 1) * self.len()]
    }

    pub(super) fn len(&self) -> usize {
        self.sites.len()
    }

    pub(super) fn at(&self, site: SiteId) -> Option<u8> {
        self.index[usize::from(site.0)]
    }

    /// Known sites of shares, by index.
    pub(crate) fn shares<'b>(
        &'b self,
        shares: impl IntoIterator<Item = (&'b SiteId, &'b f64)> + 'b,
    ) -> impl Iterator<Item = (u8, f64)> + 'b {
        shares.into_iter().filter_map(|(site, share)| Some((self.at(*site)?, *share)))
    }

    /// Where the world's side of a group's packets goes, by share: by packets over ingresses, and by handshakes over the servers
    /// that are behind each; where none is known, one is taken to be at the ingress.
    pub(super) fn ends(&self, known: &Known, mut take: impl FnMut(f64, End)) {
        let row = |number: u32| self.row_of.get(number as usize).copied().filter(|row| *row != u32::MAX);
        let rows =
            || known.talk.iter().filter_map(|(number, count)| Some((row(*number)?, f64::from(*count))));
        let mut share_out = |share: f64, home: Option<u8>| {
            let behind = |row: u32| home.is_none_or(|home| self.homes[row as usize] == home);
            let total: f64 = rows().filter(|(row, _)| behind(*row)).map(|(_, count)| count).sum();
            if total > 0.0 {
                for (row, count) in rows().filter(|(row, _)| behind(*row)) {
                    take(share * count / total, End::Row(row));
                }
            } else if let Some(home) = home {
                take(share, End::Ingress(home));
            }
        };
        if known.demand.outside.is_empty() {
            return share_out(1.0, None);
        }
        for (home, share) in self.shares(&known.demand.outside) {
            share_out(share, Some(home));
        }
    }

    /// A group's delay at every site. Waiting is not among it.
    pub(crate) fn delays(
        &self,
        model: &Model,
        id: &GroupId,
        known: Option<&Known>,
        now: Micros,
        delays: &mut Delays,
    ) {
        let Delays { ms, variance } = delays;
        for row in [&mut *ms, &mut *variance] {
            row.clear();
            row.resize(self.len(), 0.0);
        }
        let mut add = |share: f64, row_ms: &[f32], row_variance: &[f32]| {
            let (share, square) = (share as f32, (share * share) as f32);
            for ((ms, variance), (more, doubt)) in
                ms.iter_mut().zip(&mut *variance).zip(row_ms.iter().zip(row_variance))
            {
                *ms += share * more;
                *variance += square * doubt;
            }
        };
        let len = self.len();
        let (mut inside, mut access_ms) = (0, 0.0);
        if let Some(known) = known {
            for (site, share) in self.shares(&known.demand.inside) {
                let at = usize::from(site) * len..(usize::from(site) + 1) * len;
                add(share, &self.ms[at.clone()], &self.variance[at]);
                let ingress = self.sites[usize::from(site)].id;
                if model.knows_access(known) {
                    access_ms += share * model.access(id, known, ingress, now).ms;
                }
                inside += 1;
            }
            self.ends(known, |share, end| match end {
                End::Row(row) => {
                    let at = row as usize * len..(row as usize + 1) * len;
                    add(share, &self.row_ms[at.clone()], &self.row_variance[at]);
                }
                End::Ingress(site) => {
                    let at = usize::from(site) * len..(usize::from(site) + 1) * len;
                    add(share, &self.ms[at.clone()], &self.variance[at]);
                }
            });
        }
        if inside == 0 {
            for ((ms, variance), site) in ms.iter_mut().zip(&mut *variance).zip(&self.sites) {
                let Some(guess) = model.clients_to(id, site) else { continue };
                *ms += guess.ms as f32;
                *variance += guess.variance as f32;
            }
        }
        if access_ms > 0.0 {
            ms.iter_mut().for_each(|ms| *ms += access_ms as f32);
        }
    }
}
