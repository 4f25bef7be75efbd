//! Lists of pieces: bytes that lie where the kernel put them, in order.
//!
//! A frame that came in three buffers is three pieces, never joined. One table for the whole shard;
//! a list is a head, a tail and a length.
//!
//! ```text
//! list -> [buffer 7: 120..16384] -> [buffer 9: 0..16384] -> [buffer 2: 0..512]
//! ```

use crate::buffers::{BufferId, Buffers};

const NONE: u32 = u32::MAX;

/// Contiguous bytes `start..end` of a receive buffer; the piece is one of the buffer's holders.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Which buffer.
    pub buffer: BufferId,
    /// First byte.
    pub start: u32,
    /// One past the last byte.
    pub end: u32,
    next: u32,
}

impl Piece {
    /// Length in bytes.
    pub fn bytes(&self) -> usize {
        (self.end - self.start) as usize
    }
}

/// A list of pieces.
#[derive(Clone, Copy, Debug)]
pub struct PieceList {
    head: u32,
    tail: u32,
    bytes: u32,
}

impl PieceList {
    /// A list with nothing in it.
    pub const EMPTY: PieceList = PieceList {
        head: NONE,
        tail: NONE,
        bytes: 0,
    };

    /// Bytes of all pieces.
    pub fn bytes(&self) -> usize {
        self.bytes as usize
    }

    /// Whether there is no piece.
    pub fn is_empty(&self) -> bool {
        self.head == NONE
    }
}

/// All pieces of a shard, with the memory that they lie in.
pub struct Pieces {
    /// Receive buffers.
    pub buffers: Buffers,
    table: Vec<Piece>,
    free: u32,
    used: usize,
    /// Buffers whose last holder has gone: the shard gives them back to the ring.
    pub recycled: Vec<BufferId>,
}

impl Pieces {
    /// A table of `capacity` pieces.
    pub fn new(capacity: usize, buffers: Buffers) -> Pieces {
        let next = |piece: usize| {
            if piece + 1 == capacity {
                NONE
            } else {
                piece as u32 + 1
            }
        };
        let blank = |piece| Piece {
            buffer: 0,
            start: 0,
            end: 0,
            next: next(piece),
        };
        let recycled = Vec::with_capacity(buffers.count());
        Pieces {
            buffers,
            table: (0..capacity).map(blank).collect(),
            free: 0,
            used: 0,
            recycled,
        }
    }

    /// Pieces in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// Pieces left.
    pub fn available(&self) -> usize {
        self.table.len() - self.used
    }

    /// The bytes of a piece.
    pub fn bytes_of(&self, piece: &Piece) -> &[u8] {
        self.buffers
            .bytes(piece.buffer, piece.start as usize, piece.end as usize)
    }

    /// The pieces of a list.
    pub fn iter(&self, list: &PieceList) -> impl Iterator<Item = &Piece> + use<'_> {
        let mut at = list.head;
        std::iter::from_fn(move || {
            let piece = self.table.get(at as usize)?;
            at = piece.next;
            Some(piece)
        })
    }

    /// The first piece's bytes; empty for an empty list.
    pub fn front(&self, list: &PieceList) -> &[u8] {
        self.table
            .get(list.head as usize)
            .map_or(&[], |piece| self.bytes_of(piece))
    }

    /// The first `bytes` bytes of a list, or as many as there are: where they lie if that is in one
    /// piece, else copied to `scratch`, as many as fit.
    pub fn lay_out<'a>(
        &'a self,
        list: &PieceList,
        bytes: usize,
        scratch: &'a mut [u8],
    ) -> &'a [u8] {
        if let Some(front) = self.front(list).get(..bytes) {
            return front;
        }
        let bytes = bytes.min(scratch.len());
        let copied = self.copy_out(list, 0, &mut scratch[..bytes]);
        &scratch[..copied]
    }

    /// Appends a piece that is one of the holders of its buffer already. `false`: table full.
    #[must_use]
    pub fn push(&mut self, list: &mut PieceList, buffer: BufferId, start: u32, end: u32) -> bool {
        debug_assert!(start < end);
        let Some(piece) = self.table.get_mut(self.free as usize) else {
            return false;
        };
        let at = self.free;
        self.free = piece.next;
        *piece = Piece {
            buffer,
            start,
            end,
            next: NONE,
        };
        self.used += 1;
        match list.tail {
            NONE => list.head = at,
            tail => self.table[tail as usize].next = at,
        }
        list.tail = at;
        list.bytes += end - start;
        true
    }

    /// Appends received bytes: crumbs behind crumbs of the same connection are joined, so that a
    /// sender of single bytes holds one buffer and not one for each byte. Returns the number of
    /// bytes copied, or `None` when the table is full (the buffer is given back).
    pub fn push_received(
        &mut self,
        list: &mut PieceList,
        buffer: BufferId,
        bytes: u32,
    ) -> Option<usize> {
        self.buffers.take(buffer);
        if let Some(copied) = self.join_crumb(list, buffer, bytes) {
            return Some(copied);
        }
        if self.push(list, buffer, 0, bytes) {
            return Some(0);
        }
        self.release(buffer);
        None
    }

    fn join_crumb(&mut self, list: &mut PieceList, buffer: BufferId, bytes: u32) -> Option<usize> {
        const CRUMB_BYTES: u32 = 1024;
        // When buffers become short whatever fits is joined: slow senders of large frames would
        // hold one for each segment.
        let short = self.buffers.held() > self.buffers.count() / 2;
        let last = self.table.get(list.tail as usize)?;
        let into = last.buffer;
        let room = self.buffers.buffer_bytes() as u32 - last.end;
        if bytes > CRUMB_BYTES && !short || bytes > room || self.buffers.holders(into) != 1 {
            return None;
        }
        let (at, from) = (
            last.end as usize,
            self.buffers.bytes(buffer, 0, bytes as usize),
        );
        // `from` lies in another buffer than `into`; the borrow ends before the copy is made.
        let from = std::ptr::from_ref(from);
        // SAFETY: `buffer` is held by us until the release below and is not `into`.
        self.buffers.append(into, at, unsafe { &*from });
        self.table[list.tail as usize].end += bytes;
        list.bytes += bytes;
        self.release(buffer);
        Some(bytes as usize)
    }

    /// Drops the first `bytes` bytes.
    pub fn advance(&mut self, list: &mut PieceList, bytes: usize) {
        let mut rest = bytes;
        while rest > 0 {
            let piece = &mut self.table[list.head as usize];
            let here = piece.bytes().min(rest);
            piece.start += here as u32;
            rest -= here;
            if piece.start == piece.end {
                self.pop(list);
            }
        }
        list.bytes -= bytes as u32;
    }

    /// Takes the first `bytes` bytes of `from` and appends them to `to`. A buffer that both lists
    /// need then has one holder more; nothing is copied. The caller has made sure that the table
    /// has room.
    pub fn split(&mut self, from: &mut PieceList, to: &mut PieceList, bytes: usize) -> bool {
        let mut rest = bytes;
        while rest > 0 {
            let piece = self.table[from.head as usize];
            let here = piece.bytes().min(rest);
            let (start, end) = (piece.start, piece.start + here as u32);
            self.buffers.hold(piece.buffer);
            if !self.push(to, piece.buffer, start, end) {
                self.release(piece.buffer);
                return false;
            }
            self.advance(from, here);
            rest -= here;
        }
        true
    }

    /// Drops all of a list.
    pub fn clear(&mut self, list: &mut PieceList) {
        while list.head != NONE {
            self.pop(list);
        }
        *list = PieceList::EMPTY;
    }

    /// Copies the bytes from `offset` on into `to`; returns how many were there to copy.
    pub fn copy_out(&self, list: &PieceList, offset: usize, to: &mut [u8]) -> usize {
        let (mut skip, mut filled) = (offset, 0);
        for piece in self.iter(list) {
            let bytes = self.bytes_of(piece);
            let from = &bytes[skip.min(bytes.len())..];
            skip -= skip.min(bytes.len());
            let here = from.len().min(to.len() - filled);
            to[filled..filled + here].copy_from_slice(&from[..here]);
            filled += here;
            if filled == to.len() {
                break;
            }
        }
        filled
    }

    /// Takes the first `bytes` bytes out, copied behind what `to` holds.
    pub fn move_out(&mut self, list: &mut PieceList, bytes: usize, to: &mut Vec<u8>) {
        let mut rest = bytes;
        while rest > 0 {
            let front = self.front(list);
            let here = front.len().min(rest);
            to.extend_from_slice(&front[..here]);
            self.advance(list, here);
            rest -= here;
        }
    }

    fn pop(&mut self, list: &mut PieceList) {
        let at = list.head;
        let piece = self.table[at as usize];
        list.head = piece.next;
        if list.head == NONE {
            list.tail = NONE;
        }
        self.table[at as usize].next = self.free;
        self.free = at;
        self.used -= 1;
        self.release(piece.buffer);
    }

    fn release(&mut self, buffer: BufferId) {
        if self.buffers.release(buffer) {
            self.recycled.push(buffer);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pieces() -> Pieces {
        Pieces::new(16, Buffers::new(8, 64).unwrap())
    }

    fn receive(pieces: &mut Pieces, list: &mut PieceList, buffer: BufferId, bytes: &[u8]) -> usize {
        // What the ring does: it writes into a buffer nobody holds.
        pieces.buffers.take(buffer);
        pieces.buffers.append(buffer, 0, bytes);
        assert!(pieces.buffers.release(buffer));
        pieces
            .push_received(list, buffer, bytes.len() as u32)
            .unwrap()
    }

    fn all(pieces: &Pieces, list: &PieceList) -> Vec<u8> {
        pieces
            .iter(list)
            .flat_map(|piece| pieces.bytes_of(piece).to_vec())
            .collect()
    }

    #[test]
    fn crumbs_are_joined_and_their_buffers_given_back() {
        let (mut pieces, mut list) = (pieces(), PieceList::EMPTY);
        assert_eq!(receive(&mut pieces, &mut list, 0, b"abc"), 0);
        assert_eq!(receive(&mut pieces, &mut list, 1, b"de"), 2);
        assert_eq!(all(&pieces, &list), b"abcde");
        assert_eq!(pieces.recycled, vec![1]);
        assert_eq!(pieces.buffers.held(), 1);
    }

    #[test]
    fn split_shares_a_buffer_between_two_frames() {
        let (mut pieces, mut list, mut first) = (pieces(), PieceList::EMPTY, PieceList::EMPTY);
        receive(&mut pieces, &mut list, 3, b"onetwo");
        assert!(pieces.split(&mut list, &mut first, 3));
        assert_eq!(
            (all(&pieces, &first), all(&pieces, &list)),
            (b"one".into(), b"two".into())
        );
        pieces.clear(&mut list);
        assert!(pieces.recycled.is_empty());
        pieces.clear(&mut first);
        assert_eq!((pieces.recycled.clone(), pieces.used()), (vec![3], 0));
    }

    #[test]
    fn copy_out_crosses_pieces() {
        let (mut pieces, mut list) = (pieces(), PieceList::EMPTY);
        receive(&mut pieces, &mut list, 0, &[7; 64]);
        receive(&mut pieces, &mut list, 1, b"tail");
        let mut out = [0; 8];
        assert_eq!(pieces.copy_out(&list, 62, &mut out), 6);
        assert_eq!(&out[..6], b"\x07\x07tail");
        let mut moved = b"-".to_vec();
        pieces.move_out(&mut list, 65, &mut moved);
        assert_eq!((moved.len(), moved[65]), (66, b't'));
        assert_eq!(all(&pieces, &list), b"ail");
        pieces.clear(&mut list);
        assert_eq!((pieces.used(), pieces.buffers.held()), (0, 0));
    }
}
