//! Whether a node has in time what its leader says is committed. Signs of life are short and may come while entries do not.

use flow::Micros;

/// What is awaited, and since when.
#[derive(Debug, Default)]
pub(crate) struct Lag {
    due: Option<(u64, Micros)>,
}

impl Lag {
    /// A leader said that all up to an index is committed; `applied` is what this node has.
    pub(crate) fn hear(&mut self, committed: u64, applied: Option<u64>, now: Micros) {
        if self.age(applied, now).is_none() {
            self.due = Some((committed, now));
        }
    }

    /// How long something is awaited that is not there.
    pub(crate) fn age(&self, applied: Option<u64>, now: Micros) -> Option<Micros> {
        let (due, since) = self.due?;
        (applied < Some(due)).then(|| now.since(since))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000;

    fn at(s: u64) -> Micros {
        Micros(s * S)
    }

    #[test]
    fn what_is_awaited_ages_until_it_is_there_whatever_is_committed_meanwhile() {
        let mut lag = Lag::default();
        assert_eq!(lag.age(None, at(1)), None);
        lag.hear(10, Some(9), at(1));
        lag.hear(30, Some(9), at(4));
        assert_eq!(lag.age(Some(9), at(7)), Some(at(6)));
        assert_eq!(lag.age(Some(10), at(7)), None);
        lag.hear(40, Some(10), at(8));
        assert_eq!(lag.age(Some(39), at(9)), Some(at(1)));
    }

    #[test]
    fn a_node_without_any_entry_awaits_the_first() {
        let mut lag = Lag::default();
        lag.hear(0, None, at(1));
        assert_eq!((lag.age(None, at(3)), lag.age(Some(0), at(3))), (Some(at(2)), None));
    }
}
