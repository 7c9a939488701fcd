//! The one ledger of places, at the gate: `core::budget` under a lock, with those who wait.
//!
//! A place is given back by dropping it, whatever became of its session: no message is counted. Whoever waits may be dropped at
//! any point; a place that was on its way to him comes back by itself.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::consumers::{By, Consumer, Recogniser, Session};
use super::front::routes::Routes;
use super::hooks::{self, Identity, Permit, Refusal};
use crate::core::budget::{self, Book, Class, ConsumerId, Damper, Numbers, Share, Standing, Ticket};

/// Regions that only named themselves are promised places too, but no more of them than a MAAS has: names are free.
const MOST_UNREGISTERED: usize = 16;

#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// After so long the client is told that it waits.
    pub notice: Duration,
    /// After so long it is told that it waits in vain. asyncpg gives up after 60 s, psycopg2 and lib/pq never.
    pub deadline: Duration,
    /// For so long after the gate opened backends are opened at a bounded rate.
    pub settle: Duration,
    pub per_second: u32,
    pub burst: u32,
}

impl Default for Patience {
    fn default() -> Patience {
        Patience {
            notice: Duration::from_secs(2),
            deadline: Duration::from_secs(15),
            settle: Duration::from_secs(10),
            // 400 sessions, four regions' worth, in under two seconds.
            per_second: 250,
            burst: 50,
        }
    }
}

#[derive(Clone)]
pub struct Ledger {
    shared: Arc<Shared>,
}

struct Shared {
    // Held for a few look-ups, never across an await.
    state: Mutex<State>,
    patience: Patience,
}

struct State {
    book: Book,
    recogniser: Recogniser,
    /// Regions that named themselves, in the order in which they came.
    unregistered: Vec<ConsumerId>,
    waiting: HashMap<Ticket, oneshot::Sender<Place>>,
    /// While the gate settles.
    damper: Option<(Damper, Instant)>,
    born: Instant,
}

/// A place in the ledger. Dropping it gives it back.
pub struct Place {
    consumer: ConsumerId,
    shared: Arc<Shared>,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a place of {}", self.consumer)
    }
}

impl Place {
    pub fn consumer(&self) -> &ConsumerId {
        &self.consumer
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let consumer = &self.consumer;
        self.shared.change(|state| state.book.release(consumer));
    }
}

/// In a queue; dropping it leaves the queue.
struct Waiting<'a> {
    consumer: ConsumerId,
    ticket: Ticket,
    shared: &'a Arc<Shared>,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.shared.change(|state| {
            state.waiting.remove(&self.ticket);
            // `false`: the place is in the channel, and comes back with it.
            state.book.cancel(&self.consumer, self.ticket);
        });
    }
}

impl Ledger {
    pub fn new(places: u32, patience: Patience) -> Ledger {
        let state = State {
            book: Book::new(places),
            recogniser: Recogniser::default(),
            unregistered: Vec::new(),
            waiting: HashMap::new(),
            damper: None,
            born: Instant::now(),
        };
        Ledger { shared: Arc::new(Shared { state: Mutex::new(state), patience }) }
    }

    /// How many places there are, and for whom, in the order of registration.
    pub fn set_terms(&self, places: u32, consumers: Vec<Consumer>) {
        self.shared.change(|state| {
            state.recogniser.register(consumers);
            state.apply(places);
        });
    }

    /// The gate has opened: everybody comes back at once. Ends when it has settled; whoever drops it ends the damping.
    pub async fn settle(&self) {
        let Patience { settle, per_second, burst, .. } = self.shared.patience;
        let end = Instant::now() + settle;
        let settling = Settling(&self.shared);
        self.shared.change(|state| {
            state.damper = Some((Damper::new(per_second, burst, state.now_ms(Instant::now())), end));
        });
        // A token's time: the damper has nothing to wait for but the clock.
        let mut tick = tokio::time::interval(Duration::from_secs(1) / per_second.max(1));
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while Instant::now() < end {
            tick.tick().await;
            self.shared.change(|_| ());
        }
        drop(settling);
    }

    /// Waits for a place. `notice` is called once, if it takes long. Dropped, it leaves the queue.
    pub async fn admit(&self, session: &Session<'_>, notice: impl FnOnce(&Numbers) + Send) -> Result<Place, Refusal> {
        let began = Instant::now();
        let patience = self.shared.patience;
        let (sender, mut receiver) = oneshot::channel();
        let (waiting, by) = {
            let mut asked = None;
            self.shared.change(|state| {
                let found = state.recognise(session);
                asked = Some(match state.book.arrive(&found.id) {
                    Ok(ticket) => {
                        state.waiting.insert(ticket, sender);
                        Ok((found, ticket))
                    }
                    Err(budget::Refusal::QueueFull(numbers)) => Err(numbers),
                });
            });
            let asked = asked.expect("the closure has run");
            let (found, ticket) = asked.map_err(|numbers| too_many(&numbers, Duration::ZERO))?;
            (Waiting { consumer: found.id, ticket, shared: &self.shared }, found.by)
        };
        let gone = || Refusal::new("57P01", "the ledger is gone");
        if let Ok(place) = timeout_at(began + patience.notice, &mut receiver).await {
            return place.map_err(|_| gone());
        }
        let numbers = self.shared.lock().book.numbers(&waiting.consumer);
        tracing::info!(consumer = %waiting.consumer, ?by, used = numbers.used, waiting = numbers.waiting, "waits for a place");
        notice(&numbers);
        if let Ok(place) = timeout_at(began + patience.deadline, &mut receiver).await {
            return place.map_err(|_| gone());
        }
        let given_up = {
            let mut state = self.shared.lock();
            state.waiting.remove(&waiting.ticket);
            state.book.give_up(&waiting.consumer, waiting.ticket)
        };
        match given_up {
            Some(numbers) => Err(too_many(&numbers, began.elapsed())),
            // In the last moment after all.
            None => receiver.await.map_err(|_| gone()),
        }
    }

    pub fn standings(&self) -> Vec<Standing> {
        self.shared.lock().book.standings()
    }

    /// In use, and in all.
    pub fn sums(&self) -> (u32, u32) {
        let state = self.shared.lock();
        (state.book.used(), state.book.places())
    }
}

struct Settling<'a>(&'a Arc<Shared>);

impl Drop for Settling<'_> {
    fn drop(&mut self) {
        self.0.change(|state| state.damper = None);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes something, then lets in whoever can come in now.
    fn change(self: &Arc<Shared>, change: impl FnOnce(&mut State)) {
        let mut returned = Vec::new();
        {
            let mut state = self.lock();
            change(&mut state);
            let most = state.ready();
            let granted = state.book.grant(most);
            state.took(granted.len());
            for (consumer, ticket) in granted {
                let place = Place { consumer, shared: self.clone() };
                match state.waiting.remove(&ticket) {
                    // Nobody listens any more: the place comes back.
                    Some(sender) => returned.extend(sender.send(place).err()),
                    None => returned.push(place),
                }
            }
        }
        // Outside the lock: giving back takes it.
        drop(returned);
    }
}

impl State {
    fn recognise(&mut self, session: &Session<'_>) -> super::consumers::Recognised {
        let found = self.recogniser.recognise(session);
        let itself = matches!(found.by, By::ApplicationName | By::Learned) && found.class == Class::Region;
        let registered = self.recogniser.registered().iter().any(|consumer| consumer.id == found.id);
        if itself
            && !registered
            && !self.unregistered.contains(&found.id)
            && self.unregistered.len() < MOST_UNREGISTERED
        {
            self.unregistered.push(found.id.clone());
            self.apply(self.book.places());
        }
        found
    }

    fn apply(&mut self, places: u32) {
        let registered = self.recogniser.registered();
        let mut shares: Vec<(ConsumerId, Share)> = registered.iter().map(|c| (c.id.clone(), c.share())).collect();
        self.unregistered.retain(|id| !registered.iter().any(|consumer| consumer.id == *id));
        let class = Share { guaranteed: Class::Region.guaranteed(), limit: None };
        shares.extend(self.unregistered.iter().map(|id| (id.clone(), class)));
        self.book.set_terms(places, &shares);
    }

    fn now_ms(&self, now: Instant) -> u64 {
        u64::try_from((now - self.born).as_millis()).unwrap_or(u64::MAX)
    }

    /// How many may be let in at this moment.
    fn ready(&mut self) -> usize {
        let now = Instant::now();
        let now_ms = self.now_ms(now);
        match &mut self.damper {
            Some((damper, end)) if now < *end => damper.ready(now_ms),
            _ => usize::MAX,
        }
    }

    fn took(&mut self, opened: usize) {
        if let Some((damper, _)) = &mut self.damper {
            damper.take(opened);
        }
    }
}

/// 53300 with the numbers that decided, and what can be done.
fn too_many(numbers: &Numbers, waited: Duration) -> Refusal {
    let Numbers { consumer, used, guaranteed, limit, waiting, used_by_all, places } = numbers;
    let most = limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {limit}"));
    let detail = format!(
        "used {used}, guaranteed {guaranteed}, {most}, waiting {waiting}; {used_by_all} of {places} places in use by all; waited {:.1} s",
        waited.as_secs_f64()
    );
    let hint = if limit.is_some_and(|limit| *used >= limit) {
        "This consumer is at its own limit: raise it, or lower num_workers of the region."
    } else if used < guaranteed {
        "Places promised to this consumer are still held by others; they come back as sessions end."
    } else {
        "Raise max_connections or the consumer's guarantee; for a MAAS region num_workers decides how many it takes."
    };
    Refusal::new("53300", format!("too many connections for \"{consumer}\"")).detail(detail).hint(hint)
}

// === As the front knows it ===

/// The ledger, with what is needed to know a router from a member.
pub struct Counted {
    pub ledger: Ledger,
    pub routes: Arc<Routes>,
}

#[async_trait]
impl hooks::Ledger for Counted {
    async fn admit(&self, who: &Identity, tell: oneshot::Sender<String>) -> Result<Permit, Refusal> {
        let router = who.via.as_deref().filter(|via| !self.is_member(via));
        let session = Session {
            certificate: who.certificate.as_deref(),
            router,
            address: who.address,
            user: &who.user,
            database: &who.database,
            application_name: &who.application_name,
        };
        let place = self.ledger.admit(&session, |numbers| {
            // Gone meanwhile: then nobody is to be told.
            let _ = tell.send(waits(numbers));
        });
        place.await.map(Permit::new)
    }
}

impl Counted {
    /// A member's front passes on whoever comes to it; that is nobody's name.
    fn is_member(&self, via: &str) -> bool {
        let routing = self.routes.changes().borrow().clone();
        routing.is_some_and(|routing| routing.members.keys().any(|name| name.as_str() == via))
    }
}

fn waits(numbers: &Numbers) -> String {
    format!(
        "waiting for a connection: \"{}\" uses {} ({} guaranteed), {} waiting; {} of {} places are in use",
        numbers.consumer, numbers.used, numbers.guaranteed, numbers.waiting, numbers.used_by_all, numbers.places
    )
}

#[cfg(test)]
mod tests;
