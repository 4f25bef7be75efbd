//! Small pieces of memory that replies are written to and sent from.
//!
//! One block, registered with the ring as a fixed buffer, cut into chunks. A chunk is filled from
//! its start; bytes once written are not changed until the chunk is free again, so more replies
//! may be appended behind bytes that the kernel is sending.

/// Index of a chunk.
pub type ChunkId = u32;

/// No chunk.
pub const NO_CHUNK: ChunkId = u32::MAX;

/// Bytes of one chunk: 512 acknowledgements, or the longest prefix of a usual frame.
pub const CHUNK_BYTES: usize = 2048;

struct Meta {
    /// Bytes written.
    end: u16,
    /// Bytes sent.
    start: u16,
    /// Next chunk of the same queue, or the next free one.
    next: ChunkId,
}

/// All chunks of a shard.
pub struct SendPool {
    memory: *mut u8,
    meta: Vec<Meta>,
    free: ChunkId,
    used: usize,
}

/// A queue of chunks: what one connection has to send, in order.
#[derive(Clone, Copy, Debug)]
pub struct ChunkQueue {
    head: ChunkId,
    tail: ChunkId,
}

impl ChunkQueue {
    /// A queue with nothing in it.
    pub const EMPTY: ChunkQueue = ChunkQueue {
        head: NO_CHUNK,
        tail: NO_CHUNK,
    };

    /// Whether nothing is left to send.
    pub fn is_empty(&self) -> bool {
        self.head == NO_CHUNK
    }
}

impl SendPool {
    /// A pool of `count` chunks. The memory is never given back: the kernel may hold it until the
    /// process ends.
    pub fn new(count: usize) -> SendPool {
        let memory = Box::leak(vec![0u8; count * CHUNK_BYTES].into_boxed_slice()).as_mut_ptr();
        let next = |chunk: usize| {
            if chunk + 1 == count {
                NO_CHUNK
            } else {
                chunk as u32 + 1
            }
        };
        let meta = (0..count)
            .map(|chunk| Meta {
                end: 0,
                start: 0,
                next: next(chunk),
            })
            .collect();
        SendPool {
            memory,
            meta,
            free: 0,
            used: 0,
        }
    }

    /// The whole block, to be registered with the ring.
    pub fn memory(&self) -> &'static [u8] {
        // SAFETY: leaked in `new`, so it lives for ever. The kernel is told the address; nobody
        // reads through this slice.
        unsafe { std::slice::from_raw_parts(self.memory, self.meta.len() * CHUNK_BYTES) }
    }

    /// Chunks in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Chunks that are left.
    pub fn free_chunks(&self) -> usize {
        self.meta.len() - self.used
    }

    /// An empty chunk, if there is one.
    pub fn allocate(&mut self) -> Option<ChunkId> {
        let chunk = self.free;
        let meta = self.meta.get_mut(chunk as usize)?;
        self.free = meta.next;
        *meta = Meta {
            end: 0,
            start: 0,
            next: NO_CHUNK,
        };
        self.used += 1;
        Some(chunk)
    }

    /// Gives a chunk back.
    pub fn free(&mut self, chunk: ChunkId) {
        self.meta[chunk as usize].next = self.free;
        self.free = chunk;
        self.used -= 1;
    }

    /// The bytes `start..end` of a chunk.
    pub fn bytes(&self, chunk: ChunkId, start: usize, end: usize) -> &[u8] {
        assert!(start <= end && end <= usize::from(self.meta[chunk as usize].end));
        // SAFETY: in bounds; written bytes of a chunk in use do not change.
        unsafe {
            let base = self.memory.add(chunk as usize * CHUNK_BYTES);
            std::slice::from_raw_parts(base.add(start), end - start)
        }
    }

    /// All that was written to a chunk.
    pub fn written(&self, chunk: ChunkId) -> &[u8] {
        self.bytes(chunk, 0, usize::from(self.meta[chunk as usize].end))
    }

    /// Writes behind what the chunk holds; `false` when it does not fit.
    pub fn write(&mut self, chunk: ChunkId, bytes: &[u8]) -> bool {
        let meta = &mut self.meta[chunk as usize];
        let end = usize::from(meta.end);
        if end + bytes.len() > CHUNK_BYTES {
            return false;
        }
        // SAFETY: in bounds by the check above; the kernel only reads below `end`.
        unsafe {
            let to = self.memory.add(chunk as usize * CHUNK_BYTES + end);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
        meta.end += bytes.len() as u16;
        true
    }

    /// Appends to a queue; `false` when no chunk is free (nothing was written).
    pub fn push(&mut self, queue: &mut ChunkQueue, bytes: &[u8]) -> bool {
        assert!(bytes.len() <= CHUNK_BYTES);
        if queue.tail != NO_CHUNK && self.write(queue.tail, bytes) {
            return true;
        }
        let Some(chunk) = self.allocate() else {
            return false;
        };
        match queue.tail {
            NO_CHUNK => queue.head = chunk,
            tail => self.meta[tail as usize].next = chunk,
        }
        queue.tail = chunk;
        self.write(chunk, bytes)
    }

    /// Appends bytes of any number to a queue; `false` when they do not all fit (what was written
    /// stays).
    pub fn push_all(&mut self, queue: &mut ChunkQueue, bytes: &[u8]) -> bool {
        bytes.chunks(CHUNK_BYTES).all(|part| self.push(queue, part))
    }

    /// Unsent bytes of a queue.
    pub fn unsent_bytes(&self, queue: &ChunkQueue) -> usize {
        self.unsent(queue).map(<[u8]>::len).sum()
    }

    /// The unsent bytes of a queue, chunk by chunk.
    pub fn unsent<'a>(&'a self, queue: &ChunkQueue) -> impl Iterator<Item = &'a [u8]> {
        let mut chunk = queue.head;
        std::iter::from_fn(move || {
            let meta = self.meta.get(chunk as usize)?;
            let bytes = self.bytes(chunk, usize::from(meta.start), usize::from(meta.end));
            chunk = meta.next;
            Some(bytes)
        })
    }

    /// Takes `bytes` sent bytes off the front.
    pub fn sent(&mut self, queue: &mut ChunkQueue, mut bytes: usize) {
        while queue.head != NO_CHUNK {
            let meta = &mut self.meta[queue.head as usize];
            let here = usize::from(meta.end - meta.start).min(bytes);
            meta.start += here as u16;
            bytes -= here;
            if meta.start < meta.end {
                break;
            }
            let (done, next) = (queue.head, meta.next);
            queue.head = next;
            self.free(done);
        }
        if queue.head == NO_CHUNK {
            queue.tail = NO_CHUNK;
        }
        debug_assert_eq!(bytes, 0, "more was sent than queued");
    }

    /// Chunks of a queue.
    pub fn chunks(&self, queue: &ChunkQueue) -> usize {
        let mut chunk = queue.head;
        let mut count = 0;
        while let Some(meta) = self.meta.get(chunk as usize) {
            (chunk, count) = (meta.next, count + 1);
        }
        count
    }

    /// Frees a whole queue.
    pub fn clear(&mut self, queue: &mut ChunkQueue) {
        while queue.head != NO_CHUNK {
            let next = self.meta[queue.head as usize].next;
            self.free(queue.head);
            queue.head = next;
        }
        queue.tail = NO_CHUNK;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_keeps_order_over_chunks_and_partial_sends() {
        let mut pool = SendPool::new(3);
        let mut queue = ChunkQueue::EMPTY;
        assert!(pool.push(&mut queue, &[1; 1500]));
        assert!(pool.push(&mut queue, &[2; 1500]));
        assert_eq!(pool.chunks(&queue), 2);
        pool.sent(&mut queue, 1600);
        let left: Vec<u8> = pool.unsent(&queue).flatten().copied().collect();
        assert_eq!(left, vec![2; 1400]);
        pool.sent(&mut queue, 1400);
        assert!(queue.is_empty());
        assert_eq!(pool.used(), 0);
    }

    #[test]
    fn an_exhausted_pool_says_so() {
        let mut pool = SendPool::new(1);
        let mut queue = ChunkQueue::EMPTY;
        assert!(pool.push(&mut queue, &[0; CHUNK_BYTES]));
        assert!(!pool.push(&mut queue, &[0; 4]));
        pool.clear(&mut queue);
        assert!(pool.push(&mut queue, &[0; 4]));
    }
}
