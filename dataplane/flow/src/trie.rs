//! Flow groups as the leaves of a binary trie over client prefixes.
//!
//! The roots are a service's client prefixes. A leaf splits into its halves, and two sibling leaves merge;
//! so the leaves always partition the roots, and every client address has exactly one group.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::Prefix;

/// Leaves that partition a set of root prefixes, each with a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupTrie<T> {
    roots: BTreeMap<Prefix, Node<T>>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node<T> {
    Leaf(T),
    Branch(Box<[Node<T>; 2]>),
}

/// Why the shape of a trie was left as it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TrieError {
    /// The new root shares addresses with a present one.
    #[error("{new} overlaps {present}")]
    Overlap {
        /// What was to be added.
        new: Prefix,
        /// What is there.
        present: Prefix,
    },
    /// There is no such leaf.
    #[error("{0} is not a group")]
    NoLeaf(Prefix),
    /// A single address cannot be split.
    #[error("{0} is a single address and cannot be split")]
    Single(Prefix),
    /// The halves are not both leaves.
    #[error("{0} does not consist of two groups")]
    NotTwoLeaves(Prefix),
}

impl<T> GroupTrie<T> {
    /// An empty trie.
    #[must_use]
    pub fn new() -> Self {
        Self { roots: BTreeMap::new() }
    }

    /// Adds a root, as one leaf.
    ///
    /// # Errors
    /// [`TrieError::Overlap`].
    pub fn add_root(&mut self, prefix: Prefix, value: T) -> Result<(), TrieError> {
        if let Some(&present) = self.roots.keys().find(|present| present.overlaps(&prefix)) {
            return Err(TrieError::Overlap { new: prefix, present });
        }
        self.roots.insert(prefix, Node::Leaf(value));
        Ok(())
    }

    /// The leaf that an address belongs to. At most one step per bit of the address.
    #[must_use]
    pub fn lookup(&self, address: IpAddr) -> Option<(Prefix, &T)> {
        let host = Prefix::host(address);
        let (&root, mut node) = self.root_of(&host)?;
        let mut depth = root.len();
        loop {
            match node {
                Node::Leaf(value) => return Some((Prefix::containing(address, depth).ok()?, value)),
                Node::Branch(halves) => {
                    node = &halves[usize::from(Prefix::bit_at(address, depth))];
                    depth += 1;
                }
            }
        }
    }

    /// The value of a leaf.
    #[must_use]
    pub fn leaf(&self, prefix: &Prefix) -> Option<&T> {
        match self.lookup(prefix.address())? {
            (found, value) if found == *prefix => Some(value),
            _ => None,
        }
    }

    /// The value of a leaf, to be changed.
    pub fn leaf_mut(&mut self, prefix: &Prefix) -> Option<&mut T> {
        match self.node_mut(prefix)? {
            Node::Leaf(value) => Some(value),
            Node::Branch(_) => None,
        }
    }

    /// Splits a leaf; both halves get a copy of its value.
    ///
    /// # Errors
    /// [`TrieError::NoLeaf`] and [`TrieError::Single`].
    pub fn split(&mut self, prefix: &Prefix) -> Result<(Prefix, Prefix), TrieError>
    where
        T: Clone,
    {
        let value = self.leaf(prefix).ok_or(TrieError::NoLeaf(*prefix))?.clone();
        let halves = prefix.halves().ok_or(TrieError::Single(*prefix))?;
        let node = self.node_mut(prefix).ok_or(TrieError::NoLeaf(*prefix))?;
        *node = Node::Branch(Box::new([Node::Leaf(value.clone()), Node::Leaf(value)]));
        Ok(halves)
    }

    /// Merges the two halves of a prefix, which must both be leaves, into one with this value.
    ///
    /// # Errors
    /// [`TrieError::NotTwoLeaves`].
    pub fn merge(&mut self, prefix: &Prefix, value: T) -> Result<(), TrieError> {
        let error = TrieError::NotTwoLeaves(*prefix);
        let node = self.node_mut(prefix).ok_or(error)?;
        match node {
            Node::Branch(halves) if matches!(**halves, [Node::Leaf(_), Node::Leaf(_)]) => {
                *node = Node::Leaf(value);
                Ok(())
            }
            Node::Leaf(_) | Node::Branch(_) => Err(error),
        }
    }

    /// All leaves in the order of their prefixes.
    #[must_use]
    pub fn leaves(&self) -> Vec<(Prefix, &T)> {
        let mut leaves = Vec::new();
        for (&root, node) in &self.roots {
            collect(root, node, &mut leaves);
        }
        leaves
    }

    fn root_of(&self, prefix: &Prefix) -> Option<(&Prefix, &Node<T>)> {
        // Roots do not overlap, so the one that covers a prefix is the last that does not sort after it.
        self.roots.range(..=prefix).next_back().filter(|(root, _)| root.covers(prefix))
    }

    fn node_mut(&mut self, prefix: &Prefix) -> Option<&mut Node<T>> {
        let (&root, _) = self.root_of(prefix)?;
        let mut node = self.roots.get_mut(&root)?;
        for depth in root.len()..prefix.len() {
            match node {
                Node::Leaf(_) => return None,
                Node::Branch(halves) => {
                    node = &mut halves[usize::from(Prefix::bit_at(prefix.address(), depth))]
                }
            }
        }
        Some(node)
    }
}

fn collect<'a, T>(prefix: Prefix, node: &'a Node<T>, leaves: &mut Vec<(Prefix, &'a T)>) {
    match (node, prefix.halves()) {
        (Node::Branch(halves), Some((low, high))) => {
            collect(low, &halves[0], leaves);
            collect(high, &halves[1], leaves);
        }
        (Node::Leaf(value), _) => leaves.push((prefix, value)),
        (Node::Branch(_), None) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn prefix(text: &str) -> Prefix {
        text.parse().unwrap()
    }

    fn trie() -> GroupTrie<u32> {
        let mut trie = GroupTrie::new();
        trie.add_root(prefix("100.64.0.0/16"), 1).unwrap();
        trie.add_root(prefix("2001:db8::/32"), 2).unwrap();
        trie
    }

    #[test]
    fn roots_may_not_overlap() {
        let error = trie().add_root(prefix("100.64.1.0/24"), 3).unwrap_err();
        assert_eq!(
            error,
            TrieError::Overlap { new: prefix("100.64.1.0/24"), present: prefix("100.64.0.0/16") }
        );
    }

    #[test]
    fn only_leaves_split_and_only_sibling_leaves_merge() {
        let mut trie = trie();
        assert_eq!(trie.split(&prefix("100.64.0.0/17")), Err(TrieError::NoLeaf(prefix("100.64.0.0/17"))));
        let (low, _) = trie.split(&prefix("100.64.0.0/16")).unwrap();
        trie.split(&low).unwrap();
        assert_eq!(
            trie.merge(&prefix("100.64.0.0/16"), 9),
            Err(TrieError::NotTwoLeaves(prefix("100.64.0.0/16")))
        );
        trie.merge(&low, 9).unwrap();
        trie.merge(&prefix("100.64.0.0/16"), 8).unwrap();
        assert_eq!(trie.leaf(&prefix("100.64.0.0/16")), Some(&8));
    }

    #[test]
    fn addresses_outside_the_roots_have_no_group() {
        assert_eq!(trie().lookup("10.0.0.1".parse().unwrap()), None);
        assert_eq!(trie().lookup("2001:db9::".parse().unwrap()), None);
    }

    #[test]
    fn a_single_address_is_the_smallest_group() {
        let mut trie = GroupTrie::new();
        trie.add_root(prefix("10.0.0.1/32"), 1).unwrap();
        assert_eq!(trie.split(&prefix("10.0.0.1/32")), Err(TrieError::Single(prefix("10.0.0.1/32"))));
    }

    proptest! {
        #[test]
        fn every_address_has_exactly_one_leaf_after_any_splits_and_merges(
            steps in proptest::collection::vec((any::<bool>(), any::<u16>()), 0..200), probes: Vec<u16>,
        ) {
            let mut trie = trie();
            for (split, host) in steps {
                let address = IpAddr::V4((0x6440_0000 + u32::from(host)).into());
                let leaf = trie.lookup(address).unwrap().0;
                let _ = if split { trie.split(&leaf).map(|_| ()) } else { trie.merge(&leaf.parent().unwrap(), 5) };
            }
            let leaves = trie.leaves();
            let covered: u128 = leaves.iter().filter(|(p, _)| p.len() >= 16 && p.to_string().contains('.'))
                .map(|(p, _)| p.size()).sum();
            prop_assert_eq!(covered, 65_536);
            prop_assert!(leaves.windows(2).all(|pair| !pair[0].0.overlaps(&pair[1].0)));
            for host in probes {
                let address = IpAddr::V4((0x6440_0000 + u32::from(host)).into());
                let found = trie.lookup(address).unwrap().0;
                prop_assert!(found.contains(address));
                prop_assert_eq!(leaves.iter().filter(|(p, _)| p.contains(address)).count(), 1);
            }
        }
    }
}
