//! corelane: library behind the binary.
