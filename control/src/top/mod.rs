//! `corelane top`: a live view of a running process, from its `/metrics` and its
//! [`crate::overview`].
//!
//! ```text
//! status server --scrape, overview--> sample, sample --> sight --> draw --> terminal, or text
//!                  every interval        figures of the time between two
//! ```

mod draw;
mod scrape;
mod screen;
mod sight;

pub use draw::{Frame, Ui, View};
pub use scrape::Scrape;
pub use screen::{fetch, live, once};
pub use sight::{Sample, Sight, Sort};
