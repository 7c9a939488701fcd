//! Real PostgreSQL, real etcd, real processes killed.

mod harness;
