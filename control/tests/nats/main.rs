//! All that goes over NATS, against a real server that each test starts for itself: it is Debian's
//! package `nats-server`.

mod auth;
mod bridge;
mod events;
mod jetstream;
mod lab;
mod requests;
