//! pgvigil: high availability for the PostgreSQL of a MAAS. `docs/ARCHITECTURE.md` is the map.

pub mod agent;
pub mod api;
pub mod app;
pub mod cli;
pub mod client;
pub mod config;
pub mod core;
pub mod dcs;
pub mod demo;
pub mod endpoint;
pub mod fencing;
pub mod guardian;
pub mod peers;
pub mod ports;
pub mod postgres;
pub mod storage;
pub mod telemetry;
