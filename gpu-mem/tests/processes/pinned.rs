//! Pinned memory: one slab registered with CUDA and with a ring, copied on a stream.

use std::ptr::NonNull;
use std::sync::Arc;

use corelane_gpu_mem::ipc::LegacyCuda;
use corelane_gpu_mem::lane::attach::{LaneFds, LaneSize};
use corelane_gpu_mem::lane::memory::Mapping;
use corelane_gpu_mem::lane::worker::{LaneWorker, Options};
use corelane_gpu_mem::pinned::{CopyError, PinError, Pinned, Pinner, Slab, SlabConfig};
use rustix::mm::{MapFlags, ProtFlags};

use crate::common::until;
use crate::roles::{Stage, say};

const BYTES: usize = 4 << 20;
const HALF: usize = BYTES / 2;

/// Fills and checks bytes of a slab that nobody else uses.
fn fill(slab: &Slab, offset: usize, bytes: usize, with: impl Fn(usize) -> u8) {
    for at in 0..bytes {
        // SAFETY: the byte lies in the slab; no copy of it is under way.
        unsafe { slab.address().as_ptr().add(offset + at).write(with(at)) };
    }
}

fn holds(slab: &Slab, offset: usize, bytes: usize, what: impl Fn(usize) -> u8) -> bool {
    // SAFETY: as above.
    (0..bytes).all(|at| unsafe { slab.address().as_ptr().add(offset + at).read() } == what(at))
}

fn pattern(at: usize) -> u8 {
    (at * 31 % 251) as u8
}

/// The whole life of a pinned slab, on whatever driver there is.
pub(crate) fn pin() {
    let pinner = Pinner::new(0).expect("there is a GPU");
    let numa_node = pinner.numa_node();
    say(&format!("the GPU's NUMA node: {numa_node:?}"));
    let bytes = BYTES;
    let slab = Arc::new(Slab::new(SlabConfig { bytes, numa_node }).expect("memory"));
    say(&format!("the slab's placement: {:?}", slab.placement()));
    let pinned = pinner.register_slab(Arc::clone(&slab));
    if std::env::var_os("STAND_IN_HOST_REGISTER_FAILS").is_some() {
        let refused = pinned.expect_err("the driver pins nothing");
        return say(&format!("not pinned: {refused}"));
    }
    let pinned = Arc::new(pinned.expect("it is pinned"));
    refusals(&pinner, &slab);
    copies(&pinner, &slab, &pinned);
    // Unpinned while a copy is still under way, as far as its owner is concerned: it stays until
    // the copy is done. (The stand-in ends a process that unregisters too early.)
    let cuda = LegacyCuda::new(0).expect("there is a GPU");
    let device = cuda.allocate(BYTES as u64).expect("memory");
    let mut stream = pinner.stream().expect("a stream");
    // SAFETY: the device's memory outlives the stream's work, and the slab is left alone.
    unsafe { stream.upload(&pinned, 0, HALF, device.address()) }.expect("begun");
    drop(pinned);
    stream.finish().expect("done");
    drop(stream);
    let again = pinner
        .register_slab(Arc::clone(&slab))
        .expect("it was unpinned");
    drop(again);
    foreign(&pinner);
    lane(&pinner);
    say("pinned and copied");
}

fn refusals(pinner: &Pinner, slab: &Arc<Slab>) {
    let again = pinner.register_slab(Arc::clone(slab));
    assert!(matches!(again, Err(PinError::AlreadyPinned)), "{again:?}");
    for (offset, bytes) in [(1, 4096), (0, 100), (0, 0)] {
        let at = NonNull::new(slab.address().as_ptr().wrapping_add(offset)).expect("not zero");
        // SAFETY: it is refused before anything is done.
        let odd = unsafe { pinner.register(at, bytes) };
        assert!(matches!(odd, Err(PinError::NotPages { .. })), "{odd:?}");
    }
}

fn copies(pinner: &Pinner, slab: &Slab, pinned: &Arc<Pinned>) {
    let cuda = LegacyCuda::new(0).expect("there is a GPU");
    let device = cuda.allocate(BYTES as u64).expect("memory");
    fill(slab, 0, HALF, pattern);
    fill(slab, HALF, HALF, |_| 0);
    let mut stream = pinner.stream().expect("a stream");
    // SAFETY: the device's memory is ours and outlives the stream; until the copies are done
    // nobody touches the slab.
    let (up, down) = unsafe {
        let up = stream
            .upload(pinned, 0, HALF, device.address())
            .expect("begun");
        let down = stream
            .download(device.address(), HALF, pinned, HALF)
            .expect("begun");
        let outside = stream.upload(pinned, HALF + 1, HALF, device.address());
        assert!(matches!(outside, Err(CopyError::OutOfRange { .. })));
        (up, down)
    };
    assert!(up < down && stream.under_way() == 2);
    assert!(!stream.is_done(up), "nobody has looked yet");
    let mut looks = 0;
    while !stream.is_done(down) {
        stream.poll().expect("the driver answers");
        looks += 1;
        // On the stand-in a copy is done when it was asked for often enough, and not before.
        if let Ok(turns) = std::env::var("STAND_IN_COPY_TURNS") {
            let turns: usize = turns.parse().expect("a number");
            assert_eq!(stream.is_done(up), looks > turns);
        }
    }
    assert!(stream.is_done(up) && stream.under_way() == 0);
    assert!(holds(slab, HALF, HALF, pattern), "there and back");
    bounds(&mut stream, pinned, device.address());
}

/// A worker that never looks is stopped, and goes on when it has looked.
fn bounds(stream: &mut corelane_gpu_mem::pinned::CopyStream, pinned: &Arc<Pinned>, device: u64) {
    // SAFETY: the device's memory outlives the stream's work, and the slab is left alone.
    let upload = |stream: &mut corelane_gpu_mem::pinned::CopyStream| unsafe {
        stream.upload(pinned, 0, 8, device)
    };
    for _ in 0..1024 {
        upload(stream).expect("there is room");
    }
    assert!(matches!(upload(stream), Err(CopyError::StreamFull)));
    stream.finish().expect("done");
    let last = upload(stream).expect("there is room again");
    // Deadlines are the harness's: the driver is asked until it is done.
    let stream = std::cell::RefCell::new(stream);
    until(
        || {
            stream.borrow_mut().poll().expect("the driver answers");
            stream.borrow().is_done(last)
        },
        || "the copy is never done".into(),
    );
}

/// Memory that somebody else mapped is pinned as well: a lane's slab. One that cannot be written is
/// not.
fn foreign(pinner: &Pinner) {
    let memory = rustix::fs::memfd_create("somebody's", rustix::fs::MemfdFlags::CLOEXEC);
    let memory = memory.expect("a memfd");
    rustix::fs::ftruncate(&memory, BYTES as u64).expect("room");
    let map = |access| {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let at = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                BYTES,
                access,
                MapFlags::SHARED,
                &memory,
                0,
            )
        };
        NonNull::new(at.expect("mapped").cast::<u8>()).expect("not zero")
    };
    // SAFETY: both mappings stay until this process ends.
    unsafe {
        let pinned = pinner.register(map(ProtFlags::READ | ProtFlags::WRITE), BYTES);
        assert_eq!(pinned.expect("it is pinned").bytes(), BYTES);
        let read_only = pinner.register(map(ProtFlags::READ), BYTES);
        match read_only {
            Err(PinError::Cuda(error)) => say(&format!("a read-only mapping: {error}")),
            other => panic!("{other:?}"),
        }
    }
}

/// A body in a lane's slab is copied to the GPU from where it lies.
fn lane(pinner: &Pinner) {
    let size = LaneSize {
        entries: 8,
        slab_bytes: BYTES as u64,
    };
    let head = size.head(0, 1, 1);
    let fds = LaneFds::create(&head).expect("a lane");
    let (router, worker) = std::os::unix::net::UnixStream::pair().expect("a pair of sockets");
    fds.offer(&router, &head).expect("offered");
    let worker = LaneWorker::over(worker.into(), &Options::default()).expect("attached");
    // SAFETY: the worker is dropped last.
    let pinned = unsafe { worker.pin(pinner) }.expect("its slab is pinned");
    let slab = Mapping::new(&fds.slab, BYTES as u64).expect("the router's mapping");
    let body: Vec<u8> = (0..HALF).map(pattern).collect();
    assert!(slab.write(4096, &body), "the body fits");
    let cuda = LegacyCuda::new(0).expect("there is a GPU");
    let device = cuda.allocate(HALF as u64).expect("memory");
    let mut stream = pinner.stream().expect("a stream");
    // SAFETY: the device's memory outlives the stream's work; nobody writes to the slab.
    unsafe {
        let up = stream.upload(&pinned[0], 4096, HALF, device.address());
        up.expect("begun");
        stream.finish().expect("done");
        let down = stream.download(device.address(), HALF, &pinned[0], HALF);
        down.expect("begun");
    }
    stream.finish().expect("done");
    let mut back = Vec::new();
    assert!(slab.read(HALF as u64, HALF, &mut back) && back == body);
    drop((stream, pinned));
}

#[test]
fn pinned_memory_is_copied_on_the_stand_in() {
    let stage = Stage::stand_in(&[]);
    let mut role = stage.start("pin", &[("STAND_IN_COPY_TURNS", "3")]);
    let line = role.hear("NUMA node");
    assert!(
        line.contains("None"),
        "the stand-in's GPU sits nowhere: {line}"
    );
    role.finish();
}

/// Where the machine has a PCI device with a node, the slab is made there.
#[test]
fn the_slab_is_near_the_gpu_where_the_machine_says_where_that_is() {
    let devices = std::fs::read_dir("/sys/bus/pci/devices")
        .into_iter()
        .flatten();
    let ids = devices
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned());
    let node = |id: &String| corelane_gpu_mem::pinned::node_of_pci_device(id);
    let Some((id, node)) = ids.filter_map(|id| node(&id).map(|node| (id, node))).next() else {
        println!("left out: no PCI device here has a NUMA node");
        return;
    };
    let stage = Stage::stand_in(&[]);
    let mut role = stage.start("pin", &[("STAND_IN_PCI_BUS_ID", &id)]);
    let line = role.hear("NUMA node");
    assert!(line.contains(&format!("Some({node})")), "{line}");
    role.hear("pinned and copied");
    role.finish();
}

/// A driver that cannot pin is an error with its name, and the slab is there all the same.
#[test]
fn a_driver_that_does_not_pin_is_named() {
    let stage = Stage::stand_in(&[]);
    let mut role = stage.start("pin", &[("STAND_IN_HOST_REGISTER_FAILS", "1")]);
    let line = role.hear("not pinned");
    assert!(line.contains("OUT_OF_MEMORY"), "{line}");
    role.finish();
}
