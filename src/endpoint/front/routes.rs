//! Where sessions go now, and what becomes of those that went elsewhere before.
//!
//! One task publishes routings (the agent's socket, or the router's questions); sessions wait for a way that suits them.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::info;

use crate::core::Moment;
use crate::core::names::MemberName;
use crate::core::route::{Place, Reader, Route, Routing};
use crate::core::timeline::Term;
use crate::endpoint::gate::opening::Opening;
use crate::endpoint::wire::proxy::Port;
use crate::guardian::page::Page;

/// A way for one session, with what ends it.
#[derive(Clone)]
pub struct Way {
    pub to: To,
    pub opening: Arc<Opening>,
    /// Its acknowledgements pass through a gate that has to look at them, here.
    pub edge: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum To {
    Here,
    Member { member: MemberName, place: Place },
}

/// Why there is no way now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Closed {
    pub sqlstate: &'static str,
    pub text: String,
}

/// How readers are sent.
#[derive(Clone, Copy, Debug)]
pub struct ReadPolicy {
    pub max_lag: u64,
    pub fall_back: bool,
}

pub struct Routes {
    routing: watch::Sender<Option<Arc<Routing>>>,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    /// Newest last.
    pages: Vec<Arc<Page>>,
    /// Of sessions that write, with the term that they were let in under.
    write: Option<(Term, To, Arc<Opening>)>,
    /// Of readers of the standby here.
    standby: Option<Arc<Opening>>,
    /// Next reader, so that they are spread.
    turn: usize,
    watching: JoinSet<()>,
}

impl Default for Routes {
    fn default() -> Routes {
        Routes { routing: watch::Sender::new(None), inner: Mutex::default() }
    }
}

impl Routes {
    pub fn changes(&self) -> watch::Receiver<Option<Arc<Routing>>> {
        self.routing.subscribe()
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn add_page(&self, page: Arc<Page>) {
        let mut inner = self.inner();
        if let Some((_, _, opening)) = &inner.write {
            opening.add_page(&page);
        }
        inner.pages.push(page);
        let surplus = inner.pages.len().saturating_sub(2);
        inner.pages.drain(..surplus);
    }

    /// Takes a routing in: ends sessions of a term that is over, and lets waiting ones go on. Must be called on a runtime.
    pub fn publish(&self, routing: Routing) {
        {
            let mut inner = self.inner();
            inner.end_what_is_over(&routing);
            inner.open_what_is_new(&routing);
            // Those that are finished are let go of.
            while inner.watching.try_join_next().is_some() {}
        }
        self.routing.send_replace(Some(Arc::new(routing)));
    }

    /// The way for a session from `port`, if there is one now. `hop`: it came from another front and goes no further.
    pub fn way(&self, port: Port, hop: bool, policy: ReadPolicy, now: Moment) -> Result<Way, Closed> {
        let closed = |text: &str| Closed { sqlstate: "57P03", text: text.to_owned() };
        let Some(routing) = self.routing.borrow().clone() else {
            return Err(closed("the cluster's state is not known yet"));
        };
        if now.any_reached(routing.valid_until) {
            return Err(closed("the cluster's state is not known any more"));
        }
        match port {
            Port::ReadWrite => self.write_way(&routing, hop),
            Port::ReadOnly => match self.read_way(&routing, hop, policy) {
                Some(way) => Ok(way),
                None if policy.fall_back && !hop => self.write_way(&routing, hop),
                None => Err(closed("no standby is near enough to the primary for readers")),
            },
        }
    }

    fn write_way(&self, routing: &Routing, hop: bool) -> Result<Way, Closed> {
        let inner = self.inner();
        let closed = |text: String| Closed { sqlstate: "57P03", text };
        match (&routing.write, &inner.write) {
            (Route::Refuse { text, .. }, _) => Err(closed(text.clone())),
            (Route::To { member, .. }, _) if hop => Err(closed(format!("the primary is not here but on {member}"))),
            (_, Some((_, to, opening))) if !opening.is_shut() => {
                Ok(Way { to: to.clone(), opening: opening.clone(), edge: routing.sync && *to == To::Here })
            }
            _ => Err(closed(format!("term {} is over", routing.term))),
        }
    }

    fn read_way(&self, routing: &Routing, hop: bool, policy: ReadPolicy) -> Option<Way> {
        let mut inner = self.inner();
        let near = |reader: &&Reader| reader.lag.is_some_and(|lag| lag <= policy.max_lag);
        let here = routing.readers.iter().find(|reader| reader.here);
        // A front has judged already whose lag is small enough; a little more has not to end in a refusal.
        if let (Some(_), Some(opening)) = (here.filter(|reader| hop || near(reader)), &inner.standby) {
            return Some(Way { to: To::Here, opening: opening.clone(), edge: false });
        }
        if hop {
            return None;
        }
        let others: Vec<&Reader> =
            routing.readers.iter().filter(|r| !r.here && r.place.is_some()).filter(near).collect();
        inner.turn = inner.turn.wrapping_add(1);
        let reader = others.get(inner.turn % others.len().max(1))?;
        let to = To::Member { member: reader.member.clone(), place: reader.place.clone()? };
        Some(Way { to, opening: Arc::new(Opening::other()), edge: false })
    }

    /// Ends every session: the process is told to end.
    pub fn shut_all(&self) {
        let mut inner = self.inner();
        inner.shut_write("the endpoint ends");
        if let Some(standby) = inner.standby.take() {
            standby.shut();
        }
    }
}

impl Inner {
    fn shut_write(&mut self, why: &str) {
        if let Some((term, _, opening)) = self.write.take() {
            info!(%term, why, "sessions of the term are closed");
            opening.shut();
        }
    }

    /// A routing that only says "not now" ends nobody: the page and PostgreSQL itself tell whether the term is over.
    fn end_what_is_over(&mut self, routing: &Routing) {
        let over = self.write.as_ref().is_some_and(|(term, to, opening)| {
            let elsewhere = match &routing.write {
                Route::Local { term: of } => *to != To::Here || of != term,
                Route::To { member, .. } => !matches!(to, To::Member { member: of, .. } if of == member),
                Route::Refuse { .. } => false,
            };
            routing.term > *term || elsewhere || opening.is_shut()
        });
        if over {
            self.shut_write("another term, or another primary");
        }
        if !routing.standby_here
            && let Some(standby) = self.standby.take()
        {
            standby.shut();
        }
    }

    fn open_what_is_new(&mut self, routing: &Routing) {
        if routing.standby_here && self.standby.is_none() {
            self.standby = Some(Arc::new(Opening::other()));
        }
        match (&routing.write, &self.write) {
            (Route::Local { term }, None) => {
                let opening = Arc::new(Opening::primary(term.0, self.pages.clone()));
                info!(%term, "the gate opens");
                self.watching.spawn({
                    let opening = opening.clone();
                    async move { opening.watch().await }
                });
                self.write = Some((*term, To::Here, opening));
            }
            (Route::To { member, place }, None) => {
                let to = To::Member { member: member.clone(), place: place.clone() };
                self.write = Some((routing.term, to, Arc::new(Opening::other())));
            }
            _ => {}
        }
    }
}
