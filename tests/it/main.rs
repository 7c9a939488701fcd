//! One binary for everything that needs no cluster: contracts, edges, golden files, layers.

#![allow(clippy::unwrap_used, reason = "a test that panics has done its job")]

mod api;
mod cli;
mod config;
mod dcs_contract;
mod decide;
mod endpoint;
mod guardian;
mod guardian_postgresql;
mod guards;
mod layers;
mod outlook;
mod peers;
mod random;
mod review;
mod storage;
mod support;
mod takeover;
mod toy;
