//! One binary for everything that needs no cluster: contracts, edges, golden files, layers.

#![allow(clippy::unwrap_used, reason = "a test that panics has done its job")]

mod cli;
mod config;
mod decide;
mod layers;
mod toy;
