//! Events over ZMQ on the component API: between publishers and subscribers of ours, and among
//! peers that speak ZMTP byte by byte.

mod broker;
mod commands;
mod curve;
mod direct;
mod lab;
#[path = "../ports/mod.rs"]
mod ports;
mod rows;
