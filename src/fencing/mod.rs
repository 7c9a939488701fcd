//! What keeps a member from acting when it must not: the guardian's client, and the clocks that deadlines are read on.

mod by_hand;
pub mod clock;
pub mod guardian;

pub use clock::SystemClock;
pub use guardian::{GuardianFence, GuardianOptions, control_group_name};
