//! The clients' way to PostgreSQL (docs/ENDPOINT.md): *front* and *gate* in a process of their own that outlives the agent,
//! and the front alone as `pgvigil router`.
//!
//! ```text
//! client ── front ─┬─ (in process) gate ── unix socket ── PostgreSQL here
//!                  └─ PROXY v2 ──► gate of the member that leads
//! agent ── words (socket) ──► control ──► routes, opening        guardian's page ──► opening (asked before every write)
//! ```
//!
//! What must never happen here: a byte reaches a client under an old term (S4); an acknowledgement passes that a standby
//! may not have (S2); a session lives on without its place in the ledger; memory grows with the size of a message.
//!
//! Threads: one for control (agent's socket, routes, deadline, barrier), and `endpoint.threads` for the data, each with a
//! runtime of its own. A session is one task; dropping it closes both its sockets and gives back its place.

pub mod budget;
pub mod control;
pub mod count;
pub mod front;
pub mod gate;
pub mod hooks;
pub mod keeper;
pub mod router;
pub mod run;
pub mod session;
pub mod stream;
pub mod wire;
pub mod words;
