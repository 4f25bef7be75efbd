//! What a lane writes its responses with, where a handler would use a `Responder`.

use corelane_codec::control_message::PayloadCodec;
use corelane_codec::{item, two_part};

use super::Stream;
use crate::host::LaneJob;
use crate::outgoing::Lent;

/// What stands around a value that is the data of an `Annotated`.
pub(super) fn wrapping(codec: PayloadCodec, annotated: bool) -> [&'static [u8]; 2] {
    match codec {
        _ if !annotated => [b"", b""],
        PayloadCodec::Json => [b"{\"data\":", b"}"],
        PayloadCodec::MessagePack => [b"\x81\xa4data", b""],
    }
}

impl Stream {
    /// Whether nothing more will be written.
    pub(crate) fn is_over(&self) -> bool {
        self.over
    }

    /// A worker behind a lane writes it from now on, or `None`: it has ended.
    pub(crate) fn set_job(&mut self, job: Option<LaneJob>) {
        self.task_over = job.is_none();
        self.job = job;
        self.touch();
    }

    /// One item, copied.
    pub(crate) fn lane_item(&mut self, data: &[u8], annotated: bool) {
        let [before, after] = wrapping(self.codec, annotated);
        self.write_item([before, data, after]);
    }

    /// One item, not copied.
    pub(crate) fn lend_item(&mut self, lent: Lent, annotated: bool) {
        self.begin();
        let (before, after) = item::around(self.codec);
        let [inner_before, inner_after] = wrapping(self.codec, annotated);
        let around = [before, inner_before, inner_after, after].map(<[u8]>::len);
        let body_bytes = around.iter().sum::<usize>() + lent.bytes as usize;
        self.out.extend_from_slice(&two_part::prefix(0, body_bytes));
        self.out.extend_from_slice(before);
        self.out.extend_from_slice(inner_before);
        self.lent.push((self.out.len(), lent));
        self.out.extend_from_slice(inner_after);
        self.out.extend_from_slice(after);
        self.so_far.bytes += body_bytes as u64;
        self.out_items += 1;
        self.touch();
    }

    /// What was lent and not given to the socket goes back, and who writes is told.
    pub(super) fn stop_lane(&mut self, kill: bool) {
        let lent = self.lent.drain(..).map(|(_, lent)| lent);
        self.host.give_back(lent);
        if let Some(job) = self.job.take() {
            self.task_over = true;
            self.host.stopped(job, kill);
        }
    }
}
