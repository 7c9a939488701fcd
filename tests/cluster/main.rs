//! Real PostgreSQL, real etcd, real processes killed.

#![allow(clippy::unwrap_used, reason = "a test that panics has done its job")]

mod demo;
mod endpoint;
mod harness;
mod postgres_adapter;
mod scenarios;
