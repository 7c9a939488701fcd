//! Real PostgreSQL, real etcd, real processes killed.

mod postgres_adapter;
