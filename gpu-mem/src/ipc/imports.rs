//! Everything that a layout lends, open here for exactly as long as the lock is held.

use std::time::Duration;

use super::{LegacyCuda, OpenedMemory};
use crate::backend::BackendError;
use crate::client::{ClientError, Dial, IpcInfo, Session};
use crate::lock::{Grant, LockType};

/// A layout's lent memory in this process.
///
/// Fields are dropped in their order: what is open is closed before the lock passes on.
pub struct Imports {
    opened: Vec<(IpcInfo, OpenedMemory)>,
    session: Option<Session>,
    dial: Dial,
    cuda: LegacyCuda,
    /// The layout that was opened first; none for a writer, who has nothing to open.
    layout_hash: Option<String>,
}

impl Imports {
    /// Takes the lock and opens all that the layout lends. A writer of a new layout finds nothing.
    ///
    /// # Errors
    /// As [`Session::open`]; the memory is gone with its owner, or is this process's own.
    pub fn connect(
        dial: Dial,
        cuda: LegacyCuda,
        lock_type: LockType,
        wait: Option<Duration>,
    ) -> Result<Imports, ClientError> {
        let mut imports = Imports {
            opened: Vec::new(),
            session: None,
            dial,
            cuda,
            layout_hash: None,
        };
        imports.wake(lock_type, wait)?;
        Ok(imports)
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

    /// What is open, by slot.
    pub fn opened(&self) -> &[(IpcInfo, OpenedMemory)] {
        &self.opened
    }

    /// Closes everything and gives the lock up. Addresses are not kept: the driver chooses them.
    ///
    /// # Safety
    /// Nobody uses the memory any more.
    ///
    /// # Errors
    /// The driver reports that work failed; then nothing is closed and the lock is kept.
    pub unsafe fn sleep(&mut self) -> Result<(), ClientError> {
        self.cuda.synchronize().map_err(BackendError::from)?;
        self.opened.clear();
        self.session = None;
        Ok(())
    }

    /// Takes the lock again and opens the same layout.
    ///
    /// # Errors
    /// [`ClientError::Stale`] if the layout is another one: lent memory is never the same after a
    /// rebuild. Nothing is open then, and the lock is given up. [`ClientError::Awake`] where there
    /// is nothing to wake.
    pub fn wake(&mut self, lock_type: LockType, wait: Option<Duration>) -> Result<(), ClientError> {
        if self.session.is_some() {
            return Err(ClientError::Awake);
        }
        let session = Session::open(&self.dial, lock_type, wait)?;
        let builds = session.grant() == Grant::Rw;
        self.session = Some(session);
        let opened = match builds {
            true => {
                self.layout_hash = None;
                Ok(())
            }
            false => self.open_all(),
        };
        if opened.is_err() {
            // What was opened before the error is closed before the lock is given up.
            self.opened.clear();
            self.session = None;
        }
        opened
    }

    fn open_all(&mut self) -> Result<(), ClientError> {
        let session = self.session.as_mut().ok_or(ClientError::Asleep)?;
        let hash = session.layout_hash()?;
        if let Some(saved) = self.layout_hash.as_ref().filter(|saved| **saved != hash) {
            let text = format!("its hash was {saved} and is {hash}");
            return Err(ClientError::Stale(text));
        }
        for listed in session.ipc_allocations(None)? {
            let (info, offer) = session.handle_ipc(&listed.allocation_id)?;
            let memory = self.cuda.open(&offer).map_err(BackendError::from)?;
            self.opened.push((info, memory));
        }
        self.layout_hash = Some(hash);
        Ok(())
    }
}
