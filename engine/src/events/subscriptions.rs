//! Who wants what: prefixes in a trie, with the sessions that asked for each.
//!
//! ```text
//! (root)--"namespace.demo."--"component.a"  {3, 9}
//!      |                  '--"x"            {3}
//!      '--"kv-events"                       {7}
//! ```
//!
//! A subject goes to all sessions on its way down. Looking it up is not the hot path: publishers
//! keep the answer until [`Subscriptions::version`] has moved.

/// A prefix tree with edges of several bytes.
pub(super) struct Subscriptions {
    nodes: Vec<Node>,
    unused: Vec<u32>,
    wishes: usize,
    version: u64,
}

#[derive(Default)]
struct Node {
    /// The bytes from its parent to it.
    edge: Box<[u8]>,
    children: Vec<u32>,
    members: Vec<u32>,
}

impl Subscriptions {
    pub(super) fn new() -> Subscriptions {
        Subscriptions {
            nodes: vec![Node::default()],
            unused: Vec::new(),
            wishes: 0,
            version: 1,
        }
    }

    /// Pairs of a prefix and a member.
    pub(super) fn len(&self) -> usize {
        self.wishes
    }

    /// Moves with each change.
    pub(super) fn version(&self) -> u64 {
        self.version
    }

    /// Adds a member to a prefix, which it must not have already. Returns whether it is the first.
    pub(super) fn add(&mut self, prefix: &[u8], member: u32) -> bool {
        self.version += 1;
        self.wishes += 1;
        let at = self.reach(prefix);
        let members = &mut self.nodes[at as usize].members;
        members.push(member);
        members.len() == 1
    }

    /// Removes a member. Returns whether it was the prefix's last.
    pub(super) fn remove(&mut self, prefix: &[u8], member: u32) -> bool {
        let mut path = vec![0];
        let (mut at, mut rest) = (0, prefix);
        while !rest.is_empty() {
            let Some((child, shared)) = self.child(at, rest) else {
                return false;
            };
            if shared < self.nodes[child as usize].edge.len() {
                return false;
            }
            path.push(child);
            (at, rest) = (child, &rest[shared..]);
        }
        let members = &mut self.nodes[at as usize].members;
        let Some(place) = members.iter().position(|known| *known == member) else {
            return false;
        };
        members.swap_remove(place);
        let last = members.is_empty();
        self.version += 1;
        self.wishes -= 1;
        self.prune(&path);
        last
    }

    /// Adds the members of all prefixes of `subject` to `into`, each once.
    pub(super) fn matches(&self, subject: &[u8], into: &mut Vec<u32>) {
        let (mut at, mut rest) = (0, subject);
        loop {
            into.extend_from_slice(&self.nodes[at as usize].members);
            match self.child(at, rest) {
                Some((child, shared)) if shared == self.nodes[child as usize].edge.len() => {
                    (at, rest) = (child, &rest[shared..]);
                }
                _ => break,
            }
        }
        into.sort_unstable();
        into.dedup();
    }

    /// Visits each prefix that begins with `begin` and has a member.
    pub(super) fn each(&self, begin: &[u8], mut visit: impl FnMut(&[u8])) {
        let mut open = vec![(0, Vec::new())];
        while let Some((at, prefix)) = open.pop() {
            let node = &self.nodes[at as usize];
            if !node.members.is_empty() && prefix.starts_with(begin) {
                visit(&prefix);
            }
            for child in &node.children {
                let prefix = [&prefix, &*self.nodes[*child as usize].edge].concat();
                let common = prefix.len().min(begin.len());
                if prefix[..common] == begin[..common] {
                    open.push((*child, prefix));
                }
            }
        }
    }

    /// The child that shares the beginning of its edge with `rest`, and how much of it.
    fn child(&self, at: u32, rest: &[u8]) -> Option<(u32, usize)> {
        let first = rest.first()?;
        let children = &self.nodes[at as usize].children;
        let child = children
            .iter()
            .find(|child| self.nodes[**child as usize].edge.first() == Some(first))?;
        let edge = &self.nodes[*child as usize].edge;
        let shared = edge.iter().zip(rest).take_while(|(a, b)| a == b).count();
        Some((*child, shared))
    }

    /// The node of a prefix, made where it is missing.
    fn reach(&mut self, prefix: &[u8]) -> u32 {
        let (mut at, mut rest) = (0, prefix);
        while !rest.is_empty() {
            let Some((child, shared)) = self.child(at, rest) else {
                let leaf = self.node(rest);
                self.nodes[at as usize].children.push(leaf);
                return leaf;
            };
            if shared < self.nodes[child as usize].edge.len() {
                self.split(child, shared);
            }
            (at, rest) = (child, &rest[shared..]);
        }
        at
    }

    /// Cuts the edge to `node` after `shared` bytes: the node keeps its place and its first half,
    /// and what it was hangs below it.
    fn split(&mut self, node: u32, shared: usize) {
        let edge = std::mem::take(&mut self.nodes[node as usize].edge);
        let below = self.node(&edge[shared..]);
        let upper = &mut self.nodes[node as usize];
        upper.edge = edge[..shared].into();
        let children = std::mem::replace(&mut upper.children, vec![below]);
        let members = std::mem::take(&mut upper.members);
        let below = &mut self.nodes[below as usize];
        (below.children, below.members) = (children, members);
    }

    fn node(&mut self, edge: &[u8]) -> u32 {
        let node = Node {
            edge: edge.into(),
            ..Node::default()
        };
        match self.unused.pop() {
            Some(place) => {
                self.nodes[place as usize] = node;
                place
            }
            None => {
                self.nodes.push(node);
                self.nodes.len() as u32 - 1
            }
        }
    }

    /// Takes away what nobody needs any more, from the end of a path on.
    fn prune(&mut self, path: &[u32]) {
        for pair in path.windows(2).rev() {
            let (parent, node) = (pair[0], pair[1]);
            let is_bare = {
                let node = &self.nodes[node as usize];
                node.members.is_empty() && node.children.is_empty()
            };
            if !is_bare {
                return;
            }
            self.nodes[node as usize] = Node::default();
            self.unused.push(node);
            let children = &mut self.nodes[parent as usize].children;
            children.retain(|child| *child != node);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn matches(trie: &Subscriptions, subject: &[u8]) -> Vec<u32> {
        let mut found = Vec::new();
        trie.matches(subject, &mut found);
        found
    }

    #[test]
    fn a_subject_finds_all_its_prefixes() {
        let mut trie = Subscriptions::new();
        assert!(trie.add(b"kv-events", 1));
        assert!(trie.add(b"kv", 2));
        assert!(!trie.add(b"kv", 3));
        assert!(trie.add(b"", 4));
        assert!(trie.add(b"kv_metrics", 2));
        assert_eq!(matches(&trie, b"kv-events"), [1, 2, 3, 4]);
        assert_eq!(matches(&trie, b"kv-event"), [2, 3, 4]);
        assert_eq!(matches(&trie, b"kv_metrics.x"), [2, 3, 4]);
        assert_eq!(matches(&trie, b"k"), [4]);
        let before = trie.version();
        assert!(!trie.remove(b"kv", 2));
        assert!(trie.version() > before);
        assert!(trie.remove(b"kv", 3));
        assert!(!trie.remove(b"kv", 3) && !trie.remove(b"kv-e", 1) && !trie.remove(b"x", 1));
        assert_eq!(matches(&trie, b"kv-events"), [1, 4]);
        let mut prefixes = BTreeSet::new();
        trie.each(b"kv", |prefix| {
            prefixes.insert(prefix.to_vec());
        });
        let left = BTreeSet::from([b"kv-events".to_vec(), b"kv_metrics".to_vec()]);
        assert_eq!((prefixes, trie.len()), (left, 3));
    }

    /// Against a list, with prefixes that share much.
    #[test]
    fn it_answers_as_a_list_would() {
        let mut trie = Subscriptions::new();
        let mut list: BTreeSet<(Vec<u8>, u32)> = BTreeSet::new();
        let mut seed = 7u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..4000 {
            let word: Vec<u8> = (0..next(6)).map(|_| b"ab."[next(3) as usize]).collect();
            let wish = (word.clone(), next(4) as u32);
            if list.remove(&wish) {
                let last = !list.iter().any(|(prefix, _)| *prefix == wish.0);
                assert_eq!(trie.remove(&wish.0, wish.1), last);
            } else {
                let first = !list.iter().any(|(prefix, _)| *prefix == wish.0);
                assert_eq!(trie.add(&wish.0, wish.1), first);
                list.insert(wish);
            }
            let of_list: BTreeSet<u32> = list
                .iter()
                .filter(|(prefix, _)| word.starts_with(prefix))
                .map(|(_, member)| *member)
                .collect();
            assert_eq!(matches(&trie, &word), Vec::from_iter(of_list));
            assert_eq!(trie.len(), list.len());
        }
        for (prefix, member) in list {
            trie.remove(&prefix, member);
        }
        assert_eq!(trie.nodes.len() - trie.unused.len(), 1);
    }
}
