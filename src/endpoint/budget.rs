//! A ledger that counts: as many sessions as PostgreSQL has places for, in the order in which they came.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::hooks::{Identity, Ledger, Permit, Refusal};

/// MAAS' drivers wait for a connection longer than this, so a place that comes free in time costs nobody an error.
const PATIENCE: Duration = Duration::from_secs(15);

pub struct Counting {
    places: Arc<Semaphore>,
    capacity: usize,
}

impl Counting {
    pub fn new(capacity: usize) -> Counting {
        Counting { places: Arc::new(Semaphore::new(capacity)), capacity }
    }
}

#[async_trait]
impl Ledger for Counting {
    async fn admit(&self, who: &Identity) -> Result<Permit, Refusal> {
        match timeout(PATIENCE, self.places.clone().acquire_owned()).await {
            Ok(Ok(place)) => Ok(Permit::new(place)),
            // The semaphore is never closed; were it, nobody had a place.
            Ok(Err(_)) | Err(_) => {
                Err(Refusal::new("53300", format!("too many connections for user \"{}\"", who.user))
                    .detail(format!("All {} places were in use for {} s.", self.capacity, PATIENCE.as_secs()))
                    .hint("Close idle connections, or raise max_connections."))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn who() -> Identity {
        Identity {
            user: "maas".to_owned(),
            database: "maasdb".to_owned(),
            application_name: String::new(),
            address: None,
            certificate: None,
            via: None,
        }
    }

    #[tokio::test(start_paused = true)]
    async fn places_come_back_when_dropped_and_the_wait_ends() {
        let ledger = Counting::new(1);
        let place = ledger.admit(&who()).await.ok().unwrap();
        let refused = ledger.admit(&who()).await.err().unwrap();
        assert_eq!(refused.sqlstate, "53300");
        drop(place);
        assert!(ledger.admit(&who()).await.is_ok());
    }
}
