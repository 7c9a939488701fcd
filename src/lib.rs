//! pgvigil: high availability for the PostgreSQL of a MAAS. `docs/ARCHITECTURE.md` is the map.

pub mod agent;
pub mod config;
pub mod core;
pub mod ports;
