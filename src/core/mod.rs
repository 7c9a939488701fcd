//! What the cluster decides: pure functions over values, and nothing else.
//!
//! No async, no clock, no I/O, no environment, no logging, no `unwrap`. `decide(&View) -> Plan` is called by the agent's
//! loop, by tables and golden tests, by the model checker and by `pgvigil explain --replay`: always the same code.
//!
//! Invariants (docs/INVARIANTS.md) are numbered S1..S12 and L1..L6; the line that upholds one cites it.

pub mod decide;
pub mod election;
pub mod endpoint;
pub mod followers;
pub mod health;
pub mod lease;
pub mod lint;
pub mod lsn;
pub mod memory;
pub mod names;
pub mod outlook;
pub mod peers;
pub mod plan;
pub mod publish;
pub mod records;
pub mod route;
pub mod rules;
pub mod silence;
pub mod storage;
pub mod sync_set;
#[doc(hidden)]
pub mod testing;
pub mod time;
pub mod timeline;
pub mod view;

pub use lsn::Lsn;
pub use names::{ClusterName, Incarnation, MemberId, MemberName};
pub use time::Moment;
pub use timeline::{History, Term, TimelineId};
