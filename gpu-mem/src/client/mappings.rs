//! A pool's memory in this process: imported, published, put to sleep and woken at the same
//! addresses (`spec/gpu-memory.md` §3.7, §5.1).

use std::sync::Arc;
use std::time::Duration;

use super::{AllocationInfo, ClientError, Dial, Session};
use crate::backend::{Access, Mapper};
use crate::lock::{Grant, LockType};
use crate::region::Region;

/// One allocation and where it is mapped.
struct Mapping<M: Mapper> {
    info: AllocationInfo,
    region: Region<M>,
}

/// What a wake-up found.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Woken {
    /// The same memory, or an identical rebuild, is mapped where it was.
    Remapped,
    /// New memory is mapped where the old was; its contents are zero.
    Reallocated,
}

/// The memory of one pool, mapped here.
pub struct SharedMemory<M: Mapper> {
    dial: Dial,
    mapper: Arc<M>,
    /// In the order of their slots. Dropped before the session: the lock must not pass on while
    /// pages are still mapped here.
    mappings: Vec<Mapping<M>>,
    session: Option<Session>,
    /// The layout that the mappings belong to; none while this process is building one.
    layout_hash: Option<String>,
}

impl<M: Mapper> SharedMemory<M> {
    /// Connects and waits for the lock. A reader, or an adopter of a durable layout, has everything
    /// mapped when this returns.
    ///
    /// # Errors
    /// As [`Session::open`], or memory could not be mapped.
    pub fn connect(
        dial: Dial,
        mapper: Arc<M>,
        lock_type: LockType,
        wait: Option<Duration>,
    ) -> Result<SharedMemory<M>, ClientError> {
        let session = Session::open(&dial, lock_type, wait)?;
        let grant = session.grant();
        let mut memory = SharedMemory {
            dial,
            mapper,
            session: Some(session),
            mappings: Vec::new(),
            layout_hash: None,
        };
        if grant != Grant::Rw {
            memory.import_all()?;
        }
        Ok(memory)
    }

    /// What is held; none while asleep.
    pub fn grant(&self) -> Option<Grant> {
        self.session.as_ref().map(Session::grant)
    }

    /// The session, for metadata and questions.
    ///
    /// # Errors
    /// The memory is asleep.
    pub fn session(&mut self) -> Result<&mut Session, ClientError> {
        self.session.as_mut().ok_or(ClientError::Asleep)
    }

    /// How many allocations are known here.
    pub fn len(&self) -> usize {
        self.mappings.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.mappings.is_empty()
    }

    /// One allocation and its place, by its rank in the layout.
    pub fn get(&self, rank: usize) -> Option<(&AllocationInfo, &Region<M>)> {
        self.mappings
            .get(rank)
            .map(|mapping| (&mapping.info, &mapping.region))
    }

    /// Makes memory and maps it for writing. Answers its rank.
    ///
    /// # Errors
    /// Not allowed by the grant, or there is no memory.
    pub fn allocate(&mut self, size: u64, tag: &str) -> Result<usize, ClientError> {
        let mapper = Arc::clone(&self.mapper);
        let session = self.session()?;
        let info = session.allocate(size, tag)?;
        let descriptor = session.export(&info.allocation_id)?;
        let mut region = Region::reserve(mapper, info.aligned_size)?;
        region.map(descriptor, Access::ReadWrite)?;
        self.mappings.push(Mapping { info, region });
        Ok(self.mappings.len() - 1)
    }

    /// Publishes what was built and stays as a reader: everything is unmapped, committed, and
    /// mapped again for reading at the same addresses.
    ///
    /// # Safety
    /// Nobody uses the memory until this returns, nor writes to it afterwards.
    ///
    /// # Errors
    /// Not allowed by the grant; or another writer came between (stale); or the connection failed.
    pub unsafe fn publish(&mut self, wait: Option<Duration>) -> Result<(), ClientError> {
        // SAFETY: the caller vouches for all users of the memory.
        unsafe { self.unmap_all() }?;
        let mut session = self.session.take().ok_or(ClientError::Asleep)?;
        // The hash is not known before the commit, so it is taken from the shape that was built.
        let built = session.allocations(None)?;
        session.commit()?;
        let mut session = Session::open(&self.dial, LockType::Ro, wait)?;
        check_same_shape(built.iter(), &session.allocations(None)?)?;
        self.layout_hash = Some(session.layout_hash()?);
        self.session = Some(session);
        self.map_all()
    }

    /// Makes the layout durable; the memory stays mapped and writable.
    ///
    /// # Errors
    /// Not allowed by the grant, or the connection failed.
    pub fn commit_layout(&mut self) -> Result<(), ClientError> {
        self.layout_hash = Some(self.session()?.commit_layout()?);
        Ok(())
    }

    /// Unmaps everything and gives the lock up; addresses are kept.
    ///
    /// # Safety
    /// Nobody uses the memory from now until it is woken.
    ///
    /// # Errors
    /// The driver refused to unmap. The session is kept then: pages that may still be in use must
    /// not change hands.
    pub unsafe fn sleep(&mut self) -> Result<(), ClientError> {
        // SAFETY: the caller vouches for all users of the memory.
        unsafe { self.unmap_all() }?;
        self.session = None;
        Ok(())
    }

    /// Takes the lock again and maps everything where it was. A writer that finds no durable layout
    /// gets new memory of the same shape.
    ///
    /// # Errors
    /// [`ClientError::Stale`] if the layout has changed meanwhile: this value is of no more use.
    /// [`ClientError::Awake`] where there is nothing to wake.
    pub fn wake(
        &mut self,
        lock_type: LockType,
        wait: Option<Duration>,
    ) -> Result<Woken, ClientError> {
        if self.session.is_some() {
            return Err(ClientError::Awake);
        }
        let session = Session::open(&self.dial, lock_type, wait)?;
        let grant = session.grant();
        self.session = Some(session);
        let woken = match grant {
            Grant::Rw => self.reallocate().map(|()| Woken::Reallocated),
            Grant::Ro | Grant::RwData => self.remap().map(|()| Woken::Remapped),
        };
        if woken.is_err() {
            // What was mapped before the error must go before the lock does. Should the driver
            // refuse, the lock is kept until this value is dropped.
            // SAFETY: the memory slept, and nobody was told that it is awake.
            unsafe { self.unmap_all() }?;
            self.session = None;
        }
        woken
    }

    /// Maps whatever the pool holds, at new addresses.
    fn import_all(&mut self) -> Result<(), ClientError> {
        let session = self.session()?;
        let hash = session.layout_hash()?;
        let listed = session.allocations(None)?;
        for info in listed {
            let region = Region::reserve(Arc::clone(&self.mapper), info.aligned_size)?;
            self.mappings.push(Mapping { info, region });
        }
        self.layout_hash = Some(hash);
        self.map_all()
    }

    /// Checks that the layout is still ours and maps it at the old addresses.
    fn remap(&mut self) -> Result<(), ClientError> {
        let session = self.session.as_mut().ok_or(ClientError::Asleep)?;
        let hash = session.layout_hash()?;
        if let Some(saved) = self.layout_hash.as_ref().filter(|saved| **saved != hash) {
            return Err(ClientError::Stale(format!(
                "its hash was {saved} and is {hash}"
            )));
        }
        let listed = session.allocations(None)?;
        check_same_shape(self.mappings.iter().map(|mapping| &mapping.info), &listed)?;
        // A rebuild has new ids for the same shape.
        for (mapping, info) in self.mappings.iter_mut().zip(listed) {
            mapping.info = info;
        }
        self.layout_hash = Some(hash);
        self.map_all()
    }

    /// Asks for new memory of the old shape.
    fn reallocate(&mut self) -> Result<(), ClientError> {
        let session = self.session.as_mut().ok_or(ClientError::Asleep)?;
        for mapping in &mut self.mappings {
            mapping.info = session.allocate(mapping.info.size, &mapping.info.tag)?;
            if mapping.info.aligned_size != mapping.region.bytes() {
                return Err(ClientError::Stale("the granularity has changed".into()));
            }
        }
        self.layout_hash = None;
        self.map_all()
    }

    fn map_all(&mut self) -> Result<(), ClientError> {
        let session = self.session.as_mut().ok_or(ClientError::Asleep)?;
        let access = match session.grant() {
            Grant::Ro => Access::Read,
            Grant::Rw | Grant::RwData => Access::ReadWrite,
        };
        for mapping in &mut self.mappings {
            let descriptor = session.export(&mapping.info.allocation_id)?;
            mapping.region.map(descriptor, access)?;
        }
        self.mapper.synchronize()?;
        for mapping in &self.mappings {
            self.mapper.verify(mapping.region.address())?;
        }
        Ok(())
    }

    /// # Safety
    /// Nobody uses the memory from now until it is mapped again.
    unsafe fn unmap_all(&mut self) -> Result<(), ClientError> {
        self.mapper.synchronize()?;
        for mapping in &mut self.mappings {
            // SAFETY: by the contract above.
            unsafe { mapping.region.unmap() }?;
        }
        Ok(())
    }
}

/// Pairwise in the order of slots: same count, sizes and tags.
fn check_same_shape<'a>(
    ours: impl ExactSizeIterator<Item = &'a AllocationInfo>,
    theirs: &[AllocationInfo],
) -> Result<(), ClientError> {
    if ours.len() != theirs.len() {
        let text = format!(
            "there were {} allocations and are {}",
            ours.len(),
            theirs.len()
        );
        return Err(ClientError::Stale(text));
    }
    for (rank, (our, their)) in ours.zip(theirs).enumerate() {
        if (our.aligned_size, &our.tag) != (their.aligned_size, &their.tag) {
            return Err(ClientError::Stale(format!(
                "allocation {rank} has another size or tag"
            )));
        }
    }
    Ok(())
}
