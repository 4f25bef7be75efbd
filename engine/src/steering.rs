//! Which shard of a listening group gets a connection: the one whose CPU has its packets, or the
//! one that serves its network queue.
//!
//! All shards listen on one port (`SO_REUSEPORT`), and the kernel chooses by a hash unless a
//! program says otherwise. The program is classic BPF, which needs no privilege; it runs where the
//! packet that opens a connection is handled, and answers the place of a listener in the group:
//!
//! ```text
//! by CPU     A = CPU                      A == cpu of shard k ?   -> k      none of them -> hash
//! by queue   A = receive queue + 1        A == queue of shard k ? -> k      none of them -> hash
//! ```

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use crate::placement::Topology;

/// What a connection is steered by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Steering {
    /// The kernel's hash: no program.
    Hash,
    /// The CPU that handles its first packet.
    Cpu,
    /// The queue that its first packet came on.
    Queue,
}

impl Steering {
    /// Its word in logs and metrics.
    pub fn word(self) -> &'static str {
        match self {
            Steering::Hash => "hash",
            Steering::Cpu => "cpu",
            Steering::Queue => "queue",
        }
    }
}

/// A queue that a shard serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Served {
    /// The kernel's number of the device.
    pub device: u32,
    /// The queue, from 0.
    pub queue: u16,
    /// The shard's place in the group: they are counted in the order in which they began to listen.
    pub place: u32,
}

/// A program that answers a place in a listening group.
#[derive(Clone)]
pub struct Program(Arc<[libc::sock_filter]>);

impl std::fmt::Debug for Program {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Program({} instructions)", self.0.len())
    }
}

/// No place of any group: the kernel chooses by its hash.
const NONE: u32 = u32::MAX;
/// Instructions that the kernel takes in one program.
const INSTRUCTIONS_MAX: usize = 4096;

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IS: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
/// Where the kernel's own words about a packet lie.
const CPU: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_CPU) as u32;
const QUEUE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_QUEUE) as u32;
const DEVICE: u32 = (libc::SKF_AD_OFF + libc::SKF_AD_IFINDEX) as u32;

fn step(code: u16, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code, jt, jf, k }
}

/// Answers `place` if A is `value`, else goes on with what follows.
fn if_is(value: u32, place: u32) -> [libc::sock_filter; 2] {
    [step(IS, 0, 1, value), step(RETURN, 0, 0, place)]
}

impl Program {
    /// Names nobody, so that the kernel's hash chooses as it does without a program. A group that
    /// has had one gets this: taking it away is known to newer kernels only (5.3).
    pub fn none() -> Program {
        Program::of(Vec::new())
    }

    /// By CPU: pairs of a CPU and the place of the shard that gets its connections.
    pub fn by_cpu(cpus: &[(usize, u32)]) -> Program {
        let mut steps = vec![step(LOAD, 0, 0, CPU)];
        for (cpu, place) in cpus {
            steps.extend(if_is(*cpu as u32, *place));
        }
        Program::of(steps)
    }

    /// By queue. The kernel counts queues from 1 and has 0 for a packet of which no queue is
    /// known; to it that is the first queue, here too, if the packet came in by that device.
    /// Devices are looked at otherwise only where there are several: behind a bond or a VLAN the
    /// packet has another one than its queue.
    pub fn by_queue(served: &[Served]) -> Program {
        let several = served.iter().any(|one| one.device != served[0].device);
        let mut steps = Vec::new();
        for Served {
            device,
            queue,
            place,
        } in served
        {
            steps.push(step(LOAD, 0, 0, QUEUE));
            if several {
                let [test, answer] = if_is(u32::from(*queue) + 1, *place);
                // Two steps more to pass over: the load of the device and its test.
                let test = step(test.code, 0, 3, test.k);
                let device = [step(LOAD, 0, 0, DEVICE), step(IS, 0, 1, *device)];
                steps.extend([test].into_iter().chain(device).chain([answer]));
            } else {
                steps.extend(if_is(u32::from(*queue) + 1, *place));
            }
        }
        for first in served.iter().filter(|one| one.queue == 0) {
            steps.push(step(LOAD, 0, 0, QUEUE));
            steps.push(step(IS, 0, 3, 0));
            steps.push(step(LOAD, 0, 0, DEVICE));
            steps.extend(if_is(first.device, first.place));
        }
        Program::of(steps)
    }

    /// With the answer of last resort, and no longer than the kernel takes.
    fn of(mut steps: Vec<libc::sock_filter>) -> Program {
        if steps.len() >= INSTRUCTIONS_MAX {
            steps.clear();
        }
        steps.push(step(RETURN, 0, 0, NONE));
        Program(steps.into())
    }

    /// Gives it to the group of a listening socket, in place of one that it may have.
    ///
    /// # Errors
    /// The kernel's answer: it is older than 4.5, or the socket is in no group.
    pub fn attach(&self, listener: impl AsFd) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: self.0.len() as u16,
            filter: self.0.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads `len` instructions during the call and writes none of them.
        let result = unsafe {
            libc::setsockopt(
                listener.as_fd().as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_REUSEPORT_CBPF,
                (&raw const program).cast(),
                size_of::<libc::sock_fprog>() as libc::socklen_t,
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// Who gets the connections of each CPU: the shard on it; without one the shard on a thread of the
/// same physical core; without that the shards of its node in turns. CPUs of nodes without shards
/// are left to the hash. `shards` are pairs of CPU and place.
pub fn cpus_to_shards(shards: &[(usize, u32)], topology: &Topology) -> Vec<(usize, u32)> {
    let on = |cpu: usize| shards.iter().find(|(own, _)| *own == cpu);
    let node_of = |cpu: usize| topology.cpu(cpu).map(|cpu| cpu.node);
    let mut all: Vec<(usize, u32)> = shards.to_vec();
    let mut dealt = 0;
    for cpu in &topology.cpus {
        if on(cpu.number).is_some() {
            continue;
        }
        let mut siblings = cpu.siblings.iter();
        if let Some((_, place)) = siblings.find_map(|sibling| on(*sibling)) {
            all.push((cpu.number, *place));
            continue;
        }
        let near = shards
            .iter()
            .filter(|(own, _)| node_of(*own) == Some(cpu.node));
        let near: Vec<u32> = near.map(|(_, place)| *place).collect();
        if let Some(place) = near.get(dealt % near.len().max(1)) {
            all.push((cpu.number, *place));
            dealt += 1;
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::net::{SocketAddr, TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    use super::*;
    use crate::executor::listen;
    use crate::placement::{Cpu, affinity, pin_current_thread};

    /// What the kernel would do with a packet on this CPU, by this device and queue (counted from
    /// 1; 0: not known).
    fn run(program: &Program, cpu: u32, device: u32, queue: u32) -> u32 {
        let (mut at, mut a) = (0, 0);
        loop {
            let libc::sock_filter { code, jt, jf, k } = program.0[at];
            at += 1;
            match code {
                LOAD if k == CPU => a = cpu,
                LOAD if k == QUEUE => a = queue,
                LOAD if k == DEVICE => a = device,
                IS => at += usize::from(if a == k { jt } else { jf }),
                RETURN => return k,
                _ => unreachable!("not a step of ours"),
            }
        }
    }

    #[test]
    fn a_cpu_leads_to_its_shard_and_others_to_the_hash() {
        let program = Program::by_cpu(&[(3, 0), (5, 1), (4, 1)]);
        for (cpu, place) in [(3, 0), (5, 1), (4, 1), (0, NONE), (6, NONE)] {
            assert_eq!(run(&program, cpu, 1, 1), place, "{cpu}");
        }
        assert_eq!(run(&Program::by_cpu(&[]), 0, 1, 1), NONE);
        assert_eq!(run(&Program::none(), 0, 1, 1), NONE);
        let too_many: Vec<(usize, u32)> = (0..5_000).map(|cpu| (cpu, 0)).collect();
        assert_eq!(run(&Program::by_cpu(&too_many), 7, 1, 1), NONE);
    }

    #[test]
    fn a_queue_leads_to_its_shard() {
        let served = |device, queue, place| Served {
            device,
            queue,
            place,
        };
        let one = Program::by_queue(&[served(2, 0, 1), served(2, 3, 0)]);
        assert_eq!(run(&one, 0, 2, 1), 1);
        assert_eq!(run(&one, 0, 2, 4), 0);
        assert_eq!(run(&one, 0, 9, 4), 0, "behind a VLAN it is another device");
        assert_eq!(run(&one, 0, 2, 2), NONE);
        assert_eq!(run(&one, 0, 2, 0), 1, "no queue is known: the first");
        assert_eq!(run(&one, 0, 1, 0), NONE, "another device, and no queue");
        let two = Program::by_queue(&[served(2, 1, 0), served(3, 1, 1), served(3, 0, 2)]);
        assert_eq!(run(&two, 0, 2, 2), 0);
        assert_eq!(run(&two, 0, 3, 2), 1);
        assert_eq!(run(&two, 0, 4, 2), NONE);
        assert_eq!(run(&two, 0, 3, 0), 2);
        assert_eq!(run(&two, 0, 2, 0), NONE);
    }

    fn cpu(number: usize, node: usize, siblings: &[usize]) -> Cpu {
        Cpu {
            number,
            package: node,
            node,
            siblings: siblings.to_vec(),
        }
    }

    #[test]
    fn cpus_without_a_shard_go_to_the_nearest() {
        let topology = Topology {
            cpus: vec![
                cpu(0, 0, &[0, 4]),
                cpu(1, 0, &[1]),
                cpu(2, 0, &[2]),
                cpu(3, 0, &[3]),
                cpu(4, 0, &[0, 4]),
                cpu(5, 1, &[5]),
            ],
            ..Topology::default()
        };
        let all = cpus_to_shards(&[(0, 0), (1, 1)], &topology);
        assert_eq!(all, [(0, 0), (1, 1), (2, 0), (3, 1), (4, 0)]);
    }

    /// Connections over loopback are handled on the CPU that they are made on.
    #[test]
    fn the_kernel_gives_a_connection_to_the_listener_of_its_cpu() {
        let cpus = affinity().unwrap();
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let first = listen(any, true, true).unwrap();
        let address = first.local_addr().unwrap();
        let mut listeners = vec![first];
        listeners.extend(
            cpus.iter()
                .skip(1)
                .map(|_| listen(address, true, true).unwrap()),
        );
        // The last CPU's connections to the first listener, and so on: no order of chance.
        let count = cpus.len() as u32;
        let places = cpus
            .iter()
            .zip((0..count).rev())
            .map(|(cpu, place)| (*cpu, place));
        let places: Vec<(usize, u32)> = places.collect();
        Program::by_cpu(&places).attach(&listeners[0]).unwrap();
        for (cpu, place) in places {
            let dial = move || {
                pin_current_thread(cpu).unwrap();
                let streams = (0..8).map(|_| TcpStream::connect(address).unwrap());
                streams.collect::<Vec<_>>()
            };
            let streams = std::thread::spawn(dial).join().unwrap();
            let mut accepted = vec![0; listeners.len()];
            let deadline = Instant::now() + Duration::from_secs(60);
            while accepted.iter().sum::<usize>() < streams.len() && Instant::now() < deadline {
                for (listener, count) in listeners.iter().zip(&mut accepted) {
                    *count += std::iter::from_fn(|| listener.accept().ok()).count();
                }
            }
            assert_eq!(
                accepted[place as usize],
                streams.len(),
                "CPU {cpu}: {accepted:?}"
            );
        }
        let outside = TcpListener::bind(any).unwrap();
        assert!(Program::by_cpu(&[]).attach(&outside).is_err());
    }
}
