//! Which core gets a connection: the program that chooses, for cores as they listen now.

use std::cell::RefCell;
use std::io;
use std::path::Path;

use corelane_engine::config::ANY_CPU;
use corelane_engine::executor::ShardHandle;
use corelane_engine::nic::{self, QueueName};
use corelane_engine::placement::Topology;
use corelane_engine::steering::{Program, Served, Steering, cpus_to_shards};

use crate::preflight::Plan;

/// What connections are steered by, and which core serves which queue.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Placing {
    /// By what.
    pub by: Steering,
    /// Queues, each with the index of its core.
    pub queues: Vec<(usize, QueueName)>,
}

impl Default for Placing {
    fn default() -> Self {
        Self {
            by: Steering::Hash,
            queues: Vec::new(),
        }
    }
}

/// The listening group of all cores. The kernel knows its members by their places: in the order in
/// which they began to listen, and when one goes the last one takes its place. A core that listens
/// by itself is no member.
#[derive(Debug)]
pub struct Group {
    placing: RefCell<Placing>,
    /// CPUs of the cores, by index.
    cpus: Vec<usize>,
    /// Indices of the cores, by place.
    places: RefCell<Vec<usize>>,
}

impl Group {
    /// The CPUs of all cores, and which of them listen together, one after the other.
    pub fn new(placing: Placing, cores: Vec<(usize, bool)>) -> Self {
        let members = cores.iter().enumerate().filter(|(_, (_, member))| *member);
        Self {
            placing: RefCell::new(placing),
            places: RefCell::new(members.map(|(index, _)| index).collect()),
            cpus: cores.iter().map(|(cpu, _)| *cpu).collect(),
        }
    }

    /// The group of a plan; the log is told who gets what.
    pub fn of(plan: &Plan) -> Self {
        let placing = in_force(plan.placing.clone(), plan.is_handed());
        let group = Self::new(placing, plan.members());
        group.tell();
        group
    }

    /// One has stopped listening and does so anew.
    pub fn again(&self, index: usize) {
        let mut places = self.places.borrow_mut();
        if let Some(place) = places.iter().position(|known| *known == index) {
            places.swap_remove(place);
            places.push(index);
        }
    }

    /// Goes by something else from now on; answers whether it is anything new.
    pub fn change(&self, placing: Placing) -> bool {
        self.placing.replace(placing.clone()) != placing
    }

    fn place(&self, index: usize) -> Option<u32> {
        let places = self.places.borrow();
        let place = places.iter().position(|known| *known == index)?;
        u32::try_from(place).ok()
    }

    /// The program that a core brings along; `None`: the kernel's hash chooses, or it listens by
    /// itself.
    pub fn program(&self, index: usize) -> Option<Program> {
        self.place(index)?;
        let placing = self.placing.borrow();
        match placing.by {
            Steering::Hash => None,
            Steering::Cpu => {
                let cpus = self.cpus.iter().enumerate();
                let pinned = cpus.filter(|(_, cpu)| **cpu != ANY_CPU);
                let pairs = pinned.filter_map(|(index, cpu)| Some((*cpu, self.place(index)?)));
                let pairs: Vec<(usize, u32)> = pairs.collect();
                let all = cpus_to_shards(&pairs, &Topology::of_host());
                Some(Program::by_cpu(&all))
            }
            Steering::Queue => {
                let served = placing.queues.iter().filter_map(|(index, name)| {
                    Some(Served {
                        device: nic::index(Path::new("/"), &name.device)?,
                        queue: u16::try_from(name.queue).ok()?,
                        place: self.place(*index)?,
                    })
                });
                let served: Vec<Served> = served.collect();
                (!served.is_empty()).then(|| Program::by_queue(&served))
            }
        }
    }

    /// Tells the log who gets what.
    pub fn tell(&self) {
        let placing = self.placing.borrow();
        match placing.by {
            Steering::Hash => {}
            Steering::Cpu => tracing::info!(
                "steering: a connection goes to the core on the CPU that has its first packet"
            ),
            Steering::Queue => {
                for (core, queue) in &placing.queues {
                    let cpu = self.cpus.get(*core);
                    tracing::info!(core, cpu, "steering: connections of {queue} go here");
                }
            }
        }
    }
}

/// What cores are steered by that are told `wanted`. Sockets that were handed over are one, or a
/// group whose places nobody has told.
pub fn in_force(wanted: Placing, is_handed: bool) -> Placing {
    if is_handed && wanted.by != Steering::Hash {
        tracing::warn!(
            "steering is not in force: the cores take connections from sockets that were handed \
             over; let corelane listen by itself"
        );
        return Placing::default();
    }
    wanted
}

/// Says so if the program of a core that starts does not steer.
pub fn look(handle: &mut ShardHandle) {
    if let Some(why) = handle.unsteered.take() {
        unsteered(handle.shard, &why);
    }
}

/// Says that the kernel does not take the program of a core.
pub fn unsteered(core: usize, why: &io::Error) {
    tracing::warn!(
        core,
        "steering is not in force: the kernel does not take the program ({why})"
    );
}

/// Says what a refusal to poll receive queues means, and what to do.
pub fn unpolled(core: usize, why: &io::Error) {
    tracing::warn!(
        core,
        "busy_poll_us is not in force: this kernel cannot poll receive queues for a ring ({why}); \
         it takes Linux 6.9 or later with CONFIG_NET_RX_BUSY_POLL"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_follow_who_listens_anew() {
        let cores = vec![(4, true), (5, true), (8, false), (6, true)];
        let group = Group::new(Placing::default(), cores);
        let places = || [0, 1, 3].map(|index| group.place(index).unwrap());
        assert_eq!(places(), [0, 1, 2]);
        group.again(0);
        assert_eq!(places(), [2, 1, 0], "the last one took its place");
        group.again(1);
        assert_eq!(places(), [1, 2, 0]);
        group.again(2);
        assert_eq!(places(), [1, 2, 0], "it is alone");
        assert!(group.place(2).is_none() && group.program(0).is_none());
    }

    #[test]
    fn a_queue_of_a_device_that_is_gone_steers_nothing() {
        let gone = "corelane-none:0".parse().unwrap();
        let placing = Placing {
            by: Steering::Queue,
            queues: vec![(0, gone)],
        };
        assert!(Group::new(placing, vec![(0, true)]).program(0).is_none());
        let by_cpu = Placing {
            by: Steering::Cpu,
            queues: Vec::new(),
        };
        let group = Group::new(by_cpu, vec![(0, true), (1, false)]);
        assert!(group.program(0).is_some() && group.program(1).is_none());
        assert!(group.change(Placing::default()) && group.program(0).is_none());
        assert!(!group.change(Placing::default()), "it is nothing new");
    }
}
