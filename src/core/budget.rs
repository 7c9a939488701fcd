//! The budget of connections: who gets a place, who waits, and with which numbers.
//!
//! ```text
//! capacity = max_connections − reserved − the agent's own
//! ├── promised: each consumer's guaranteed places, kept free for it whether it uses them or not
//! └── unpromised: for whoever wants more than was promised to him (burst), the one with the least of it first
//! ```
//!
//! A consumer under its guarantee waits for nobody. Within a consumer it goes by the order of arrival. Places are never taken
//! away from a session: fairness is in who gets the next one.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// MAAS' documents: 40 for each region controller, and 100 in all for two of them.
pub const PER_REGION: u32 = 40;
const FOR_TWO_REGIONS: u32 = 100;

/// Nobody waits behind so many: at 15 s of patience they could not all be served, and each one holds a socket.
pub const MOST_WAITING: usize = 1000;

/// Never promised to anybody, so that a person with psql, or a region whose guarantee is pending, finds a door at all: a tenth,
/// and this at most.
const COMMON: u32 = 5;

/// `max_connections` by the rule in MAAS' documents.
pub fn maas_max_connections(regions: u32) -> u32 {
    FOR_TWO_REGIONS + PER_REGION * regions.saturating_sub(2)
}

/// Places for clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    pub max_connections: u32,
    /// `superuser_reserved_connections` and (16 and later) `reserved_connections`.
    pub reserved: u32,
    /// What pgvigil's own sessions take.
    pub agent: u32,
}

impl Capacity {
    pub fn places(&self) -> u32 {
        self.max_connections.saturating_sub(self.reserved).saturating_sub(self.agent)
    }
}

/// Who places are counted for: a region, a rack, another named client, or a nameless one by where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ConsumerId(pub String);

impl std::fmt::Display for ConsumerId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    Region,
    Rack,
    #[default]
    Other,
}

impl Class {
    /// What a consumer of this class is promised unless something else is said for it. Racks never speak to PostgreSQL.
    pub fn guaranteed(self) -> u32 {
        match self {
            Class::Region => PER_REGION,
            Class::Rack | Class::Other => 0,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    pub guaranteed: u32,
    /// No more than this, free places or not.
    pub limit: Option<u32>,
}

/// What of a wanted guarantee can be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Promise {
    pub granted: u32,
    /// Waits for a larger `max_connections`.
    pub pending: u32,
}

/// Shares in the order in which they were registered: what was promised is not taken back for a newcomer.
pub fn promises(places: u32, wanted: impl IntoIterator<Item = u32>) -> Vec<Promise> {
    let mut left = places;
    wanted
        .into_iter()
        .map(|wanted| {
            let granted = wanted.min(left);
            left -= granted;
            Promise { granted, pending: wanted - granted }
        })
        .collect()
}

/// Tickets are given in the order of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub u64);

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `MOST_WAITING` are before it already.
    QueueFull(Numbers),
}

/// What a client is told when it does not get a place, and what decided that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    pub consumer: ConsumerId,
    pub used: u32,
    pub guaranteed: u32,
    pub limit: Option<u32>,
    /// Of this consumer, this one included.
    pub waiting: u32,
    /// All sessions, and the places that there are.
    pub used_by_all: u32,
    pub places: u32,
}

/// One line of `SHOW BUDGETS`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Standing {
    pub consumer: ConsumerId,
    pub used: u32,
    pub promise: Promise,
    pub limit: Option<u32>,
    pub waiting: u32,
    /// The most that it had at once.
    pub high_water: u32,
    pub refused: u64,
}

#[derive(Clone, Debug, Default)]
struct Account {
    granted: u32,
    pending: u32,
    limit: Option<u32>,
    /// Known by registration: stays when nobody of it is here.
    registered: bool,
    used: u32,
    queue: BTreeSet<Ticket>,
    high_water: u32,
    refused: u64,
}

impl Account {
    fn burst(&self) -> u32 {
        self.used.saturating_sub(self.granted)
    }

    fn below_limit(&self) -> bool {
        self.limit.is_none_or(|limit| self.used < limit)
    }
}

/// All places and who has them. Whoever keeps it calls `grant` after everything that may have changed who is next.
#[derive(Clone, Debug)]
pub struct Book {
    places: u32,
    accounts: BTreeMap<ConsumerId, Account>,
    used: u32,
    next: u64,
}

impl Book {
    pub fn new(places: u32) -> Book {
        Book { places, accounts: BTreeMap::new(), used: 0, next: 0 }
    }

    /// New terms: places, and shares in the order of registration. Sessions that stand keep their places whatever they say.
    pub fn set_terms(&mut self, places: u32, shares: &[(ConsumerId, Share)]) {
        self.places = places;
        for account in self.accounts.values_mut() {
            (account.granted, account.pending, account.limit, account.registered) = (0, 0, None, false);
        }
        // More promised to somebody than he may have would be promised to nobody.
        let wanted = shares.iter().map(|(_, share)| share.limit.map_or(share.guaranteed, |l| share.guaranteed.min(l)));
        let promised = places - (places / 10).min(COMMON);
        for ((id, share), promise) in shares.iter().zip(promises(promised, wanted)) {
            let account = self.accounts.entry(id.clone()).or_default();
            (account.granted, account.pending) = (promise.granted, promise.pending);
            (account.limit, account.registered) = (share.limit, true);
        }
        self.accounts.retain(|_, account| account.kept());
    }

    /// Takes a place in the consumer's queue, which may be empty: `grant` says who comes in.
    pub fn arrive(&mut self, consumer: &ConsumerId) -> Result<Ticket, Refusal> {
        let account = self.accounts.entry(consumer.clone()).or_default();
        if account.queue.len() >= MOST_WAITING {
            account.refused += 1;
            return Err(Refusal::QueueFull(self.numbers(consumer)));
        }
        let ticket = Ticket(self.next);
        self.next += 1;
        account.queue.insert(ticket);
        Ok(ticket)
    }

    /// Lets in whoever can be let in, at most `most`, in the order in which they are to be served.
    pub fn grant(&mut self, most: usize) -> Vec<(ConsumerId, Ticket)> {
        let mut granted = Vec::new();
        while granted.len() < most
            && let Some(id) = self.next_in_line()
        {
            let Some(account) = self.accounts.get_mut(&id) else { break };
            let Some(ticket) = account.queue.pop_first() else { break };
            account.used += 1;
            account.high_water = account.high_water.max(account.used);
            self.used += 1;
            granted.push((id, ticket));
        }
        granted
    }

    /// Under its guarantee before over it; then who has less; then who came first.
    fn next_in_line(&self) -> Option<ConsumerId> {
        if self.used >= self.places {
            return None;
        }
        let promised: u32 = self.accounts.values().map(|a| a.granted).sum();
        let burst: u32 = self.accounts.values().map(Account::burst).sum();
        // Guaranteed places stay free for those who were promised them: that is what a guarantee is.
        let burst_free = burst < self.places.saturating_sub(promised);
        let candidates = self.accounts.iter().filter_map(|(id, account)| {
            let first = account.queue.first()?;
            let guaranteed = account.used < account.granted;
            let may = account.below_limit() && (guaranteed || burst_free);
            let has = if guaranteed { account.used } else { account.burst() };
            may.then_some(((!guaranteed, has, *first), id))
        });
        candidates.min_by_key(|(order, _)| *order).map(|(_, id)| id.clone())
    }

    /// Whoever waited does not wait any more: it went away. `false`: it was not waiting (it has a place by now).
    pub fn cancel(&mut self, consumer: &ConsumerId, ticket: Ticket) -> bool {
        let Some(account) = self.accounts.get_mut(consumer) else { return false };
        let was_waiting = account.queue.remove(&ticket);
        self.forget(consumer);
        was_waiting
    }

    /// Its patience is at an end. `None`: it has a place by now.
    pub fn give_up(&mut self, consumer: &ConsumerId, ticket: Ticket) -> Option<Numbers> {
        let account = self.accounts.get_mut(consumer)?;
        if !account.queue.contains(&ticket) {
            return None;
        }
        account.refused += 1;
        let numbers = self.numbers(consumer);
        self.cancel(consumer, ticket);
        Some(numbers)
    }

    /// A place comes back.
    pub fn release(&mut self, consumer: &ConsumerId) {
        // An account with places in use is never forgotten, so it is here, and its count is not zero.
        if let Some(account) = self.accounts.get_mut(consumer) {
            account.used = account.used.saturating_sub(1);
            self.used = self.used.saturating_sub(1);
        }
        self.forget(consumer);
    }

    /// The nameless leave nothing behind: their number is not bounded by anybody.
    fn forget(&mut self, consumer: &ConsumerId) {
        if self.accounts.get(consumer).is_some_and(|account| !account.kept()) {
            self.accounts.remove(consumer);
        }
    }

    pub fn numbers(&self, consumer: &ConsumerId) -> Numbers {
        let account = self.accounts.get(consumer).cloned().unwrap_or_default();
        Numbers {
            consumer: consumer.clone(),
            used: account.used,
            guaranteed: account.granted,
            limit: account.limit,
            waiting: count(account.queue.len()),
            used_by_all: self.used,
            places: self.places,
        }
    }

    pub fn standings(&self) -> Vec<Standing> {
        let standing = |(id, account): (&ConsumerId, &Account)| Standing {
            consumer: id.clone(),
            used: account.used,
            promise: Promise { granted: account.granted, pending: account.pending },
            limit: account.limit,
            waiting: count(account.queue.len()),
            high_water: account.high_water,
            refused: account.refused,
        };
        self.accounts.iter().map(standing).collect()
    }

    pub fn waiting(&self) -> usize {
        self.accounts.values().map(|account| account.queue.len()).sum()
    }

    pub fn used(&self) -> u32 {
        self.used
    }

    pub fn places(&self) -> u32 {
        self.places
    }
}

impl Account {
    fn kept(&self) -> bool {
        self.registered || self.used > 0 || !self.queue.is_empty()
    }
}

fn count(length: usize) -> u32 {
    u32::try_from(length).unwrap_or(u32::MAX)
}

// === Damping ===

/// How fast backends are opened after a failover, when all clients come back at once: a bucket of tokens. PostgreSQL makes a
/// process for each; two thousand at once would keep the first ones from working.
#[derive(Clone, Copy, Debug)]
pub struct Damper {
    per_second: u32,
    burst: u32,
    /// Thousandths of a token.
    level: u64,
    at_ms: u64,
}

impl Damper {
    pub fn new(per_second: u32, burst: u32, now_ms: u64) -> Damper {
        Damper { per_second, burst, level: u64::from(burst) * 1000, at_ms: now_ms }
    }

    /// How many may be opened now.
    pub fn ready(&mut self, now_ms: u64) -> usize {
        let passed = now_ms.saturating_sub(self.at_ms);
        self.at_ms = self.at_ms.max(now_ms);
        let full = u64::from(self.burst) * 1000;
        self.level = self.level.saturating_add(passed.saturating_mul(u64::from(self.per_second))).min(full);
        usize::try_from(self.level / 1000).unwrap_or(usize::MAX)
    }

    pub fn take(&mut self, opened: usize) {
        self.level = self.level.saturating_sub(u64::try_from(opened).unwrap_or(u64::MAX).saturating_mul(1000));
    }
}

#[cfg(test)]
mod tests;
