//! Keeps peers from filling the log: of what they do wrong so many lines are written in a second.
//! The counters count all of it.

/// Lines in a second.
const LINES_MAX: u32 = 20;
const SECOND_NS: u64 = 1_000_000_000;

/// How much was complained of lately.
#[derive(Debug, Default)]
pub(crate) struct Complaints {
    second: u64,
    lines: u32,
    muted: u64,
}

impl Complaints {
    /// Whether one more line may be written; the first of a second also tells how many were not.
    pub(crate) fn may(&mut self, now_ns: u64) -> bool {
        let second = now_ns / SECOND_NS;
        if second != self.second {
            (self.second, self.lines) = (second, 0);
            match std::mem::take(&mut self.muted) {
                0 => {}
                muted => tracing::warn!(muted, "complaints about clients that were not logged"),
            }
        }
        let may = self.lines < LINES_MAX;
        self.lines += u32::from(may);
        self.muted += u64::from(!may);
        may
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn so_many_lines_are_written_in_a_second() {
        let mut complaints = Complaints::default();
        let mut written = |now_ns| (0..100).filter(|_| complaints.may(now_ns)).count();
        assert_eq!(written(5), 20);
        assert_eq!(written(SECOND_NS - 1), 0);
        assert_eq!(written(SECOND_NS), 20);
        assert_eq!(complaints.muted, 80);
    }
}
