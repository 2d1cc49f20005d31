//! Network coordinates, to compare with: Dabek, Cox, Kaashoek, Morris, *Vivaldi*, SIGCOMM 2004, in three dimensions and height.

use flow::sample::Seeded;
use placement::likeness::{Estimate, Seen};

/// Rounds in which each site looks at all others.
const ROUNDS: usize = 60;
/// Steps of a place for each of its measurements.
const STEPS: usize = 40;
/// How much of the error a step takes away, and how fast the own error is learned.
const GAIN: f32 = 0.25;

#[derive(Clone, Copy)]
struct Node {
    at: [f32; 3],
    height: f32,
    error: f32,
}

impl Node {
    fn new(random: &mut Seeded) -> Self {
        Self { at: std::array::from_fn(|_| random.fraction() as f32 - 0.5), height: 1.0, error: 1.0 }
    }

    fn distance(&self, other: &Self) -> f32 {
        self.apart(other).0 + self.height + other.height
    }

    /// Length and direction of the way from the other to this.
    fn apart(&self, other: &Self) -> (f32, [f32; 3]) {
        let way: [f32; 3] = std::array::from_fn(|n| self.at[n] - other.at[n]);
        let len = way.iter().map(|x| x * x).sum::<f32>().sqrt().max(1e-3);
        (len, way.map(|x| x / len))
    }

    /// A spring between this and the other, as long as the measured delay, is let go for a moment.
    fn pull(&mut self, other: &Self, ms: f32) {
        let (len, way) = self.apart(other);
        let thought = len + self.height + other.height;
        let weight = self.error / (self.error + other.error).max(1e-6);
        let error = (thought - ms).abs() / ms.max(1.0);
        self.error = (error * GAIN * weight + self.error * (1.0 - GAIN * weight)).clamp(0.01, 1.0);
        let force = GAIN * weight * (ms - thought);
        self.at = std::array::from_fn(|n| self.at[n] + force * way[n] * len / thought.max(1e-3));
        self.height = (self.height + force * self.height / thought.max(1e-3)).max(0.1);
    }
}

/// The sites' coordinates.
pub(super) struct Net(Vec<Node>);

impl Net {
    pub(super) fn new(mesh: &[Vec<f32>], random: &mut Seeded) -> Self {
        let mut nodes: Vec<Node> = mesh.iter().map(|_| Node::new(random)).collect();
        for _ in 0..ROUNDS {
            for a in 0..nodes.len() {
                for b in 0..nodes.len() {
                    let (other, ms) = (nodes[b], mesh[a][b]);
                    if a != b && ms.is_finite() {
                        nodes[a].pull(&other, ms);
                    }
                }
            }
        }
        Self(nodes)
    }

    /// Estimates for a place; what was measured stands for itself.
    pub(super) fn estimate(&self, seen: &[Seen], random: &mut Seeded) -> Vec<Estimate> {
        let mut place = Node::new(random);
        for _ in 0..STEPS {
            seen.iter().for_each(|seen| place.pull(&self.0[seen.site], seen.ms));
        }
        let thought = |site: &Node| plain(place.distance(site), place.error, false);
        let mut estimates: Vec<Estimate> = self.0.iter().map(thought).collect();
        for seen in seen {
            estimates[seen.site] = plain(seen.ms, 0.0, true);
        }
        estimates
    }
}

/// One that says nothing beyond the delay.
fn plain(ms: f32, spread: f32, measured: bool) -> Estimate {
    Estimate { ms, spread, mean_ms: ms, measured }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plane_is_found_again() {
        let places = [(0.0, 0.0), (100.0, 0.0), (0.0, 100.0), (100.0, 100.0), (50.0, 0.0), (200.0, 40.0)];
        let ms = |a: (f32, f32), b: (f32, f32)| (a.0 - b.0).hypot(a.1 - b.1) + 2.0;
        let mesh: Vec<Vec<f32>> =
            places.iter().map(|a| places.iter().map(|b| ms(*a, *b)).collect()).collect();
        let mut random = Seeded::new(3);
        let net = Net::new(&mesh, &mut random);
        let place = (60.0, 60.0);
        let seen: Vec<Seen> =
            (0..4).map(|site| Seen { site, ms: ms(place, places[site]), sd_ms: 0.5 }).collect();
        let estimates = net.estimate(&seen, &mut random);
        for site in [4, 5] {
            let truth = ms(place, places[site]);
            assert!(
                (estimates[site].ms / truth - 1.0).abs() < 0.3,
                "{site}: {} for {truth}",
                estimates[site].ms
            );
        }
    }
}
