//! Bytes both ways between a client and its backend. One future, no task of its own; dropping it closes both sockets.
//!
//! What is read lies in a buffer of the thread, its headers are walked, and it is written on at once; only what the other
//! side does not take is kept, and while something is kept nothing more is read. So an idle session has no buffer, and a
//! row of 1 GB passes through 64 KB.

use std::cell::RefCell;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::tracker::{FromClient, FromServer, Tracker};
use crate::endpoint::count::{Counters, Gauge, Held};
use crate::endpoint::gate::barrier::{Barrier, Passing};
use crate::endpoint::gate::cancel::Target;
use crate::endpoint::gate::opening::{Opening, Verdict};
use crate::endpoint::stream::Stream;
use crate::endpoint::wire::frame::Walker;

const CHUNK: usize = 64 * 1024;
/// Bytes after a CommandComplete that are kept with it at most.
const MOST_KEPT: u64 = 64 * 1024;

thread_local! {
    /// Borrowed within one poll, never across one.
    static SCRATCH: RefCell<Box<[u8]>> = RefCell::new(vec![0; CHUNK].into_boxed_slice());
}

/// How a session came to its end.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The client closed. True: in the middle of something.
    Client {
        busy: bool,
    },
    /// PostgreSQL closed; everything it said was passed on.
    Server,
    /// The gate is shut.
    Shut,
    /// An answer could not be made good: the outcome of the transaction is not known (08007).
    Unknown(String),
    ClientViolation(String),
    ServerViolation(String),
}

pub struct Relay {
    pub client: Stream,
    pub backend: Stream,
    up: Walker,
    down: Walker,
    tracker: Tracker,
    to_backend: Spill,
    to_client: Spill,
    /// The server's stream may pass up to here.
    released: u64,
    opening: Arc<Opening>,
    target: Arc<Target>,
    cancels_seen: u64,
    barrier: Arc<dyn Barrier>,
    waiting: Option<Passing>,
    client_eof: bool,
    server_eof: bool,
    counters: Arc<Counters>,
    named_setting: Option<Held>,
}

/// Bytes that were walked and not written yet; `base` is the stream's position of the first one.
#[derive(Default)]
struct Spill {
    bytes: Vec<u8>,
    from: usize,
    base: u64,
}

impl Spill {
    fn is_empty(&self) -> bool {
        self.from == self.bytes.len()
    }

    /// What lies before `until`.
    fn before(&self, until: u64) -> &[u8] {
        let length = usize::try_from(until.saturating_sub(self.base)).unwrap_or(usize::MAX);
        let all = &self.bytes[self.from..];
        &all[..length.min(all.len())]
    }

    fn push(&mut self, bytes: &[u8]) {
        if self.from > 0 {
            self.bytes.drain(..self.from);
            self.from = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    fn written(&mut self, count: usize) {
        self.from += count;
        self.base += count as u64;
        if self.is_empty() {
            // Given back: most sessions never need it again.
            self.bytes = Vec::new();
            self.from = 0;
        }
    }
}

/// What a session is made of when its greeting is over.
pub struct Parts {
    pub client: Stream,
    pub backend: Stream,
    /// Read already and not walked yet.
    pub from_client: Vec<u8>,
    pub from_backend: Vec<u8>,
    pub opening: Arc<Opening>,
    pub target: Arc<Target>,
    pub barrier: Arc<dyn Barrier>,
    pub counters: Arc<Counters>,
    /// Acknowledgements have to be on standbys too.
    pub edge: bool,
}

impl Relay {
    /// Only bytes that begin a message may be left over.
    pub fn new(parts: Parts) -> Result<Relay, End> {
        let mut relay = Relay {
            client: parts.client,
            backend: parts.backend,
            up: Walker::default(),
            down: Walker::default(),
            tracker: Tracker::new(parts.edge),
            to_backend: Spill::default(),
            to_client: Spill::default(),
            released: 0,
            opening: parts.opening,
            target: parts.target,
            cancels_seen: 0,
            barrier: parts.barrier,
            waiting: None,
            client_eof: false,
            server_eof: false,
            counters: parts.counters,
            named_setting: None,
        };
        relay.walk_up(&parts.from_client)?;
        relay.to_backend.push(&parts.from_client);
        relay.walk_down(&parts.from_backend)?;
        relay.to_client.push(&parts.from_backend);
        Ok(relay)
    }

    /// Until the session ends. Cancel-safe: everything that is under way is in `self`.
    pub async fn run(&mut self) -> End {
        let mut phase = self.opening.phase();
        loop {
            phase.mark_unchanged();
            let poll = std::future::poll_fn(|cx| self.poll(cx));
            // Both are cancel-safe.
            tokio::select! {
                biased;
                end = poll => return end,
                // Shut ends the session, and the end of a hold lets it go on: both are found out by looking again.
                _ = phase.changed() => {}
            }
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        match self.opening.verdict() {
            Verdict::Shut => return Poll::Ready(End::Shut),
            Verdict::Hold => return Poll::Pending,
            Verdict::Pass => {}
        }
        if let Poll::Ready(end) = self.poll_down(cx) {
            return Poll::Ready(end);
        }
        self.poll_up(cx)
    }

    // === PostgreSQL to client ===

    fn poll_down(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            while !self.to_client.before(self.released).is_empty() {
                // S4: asked before every write, however short the time since the last one.
                match self.opening.verdict() {
                    Verdict::Shut => return Poll::Ready(End::Shut),
                    Verdict::Hold => return Poll::Pending,
                    Verdict::Pass => {}
                }
                let bytes = self.to_client.before(self.released);
                match ready!(Pin::new(&mut self.client).poll_write(cx, bytes)) {
                    Ok(0) | Err(_) => return Poll::Ready(self.client_left()),
                    Ok(count) => self.to_client.written(count),
                }
            }
            if self.tracker.held().is_some() {
                if let Err(end) = ready!(self.poll_barrier(cx)) {
                    return Poll::Ready(end);
                }
                continue;
            }
            if self.server_eof {
                return Poll::Ready(End::Server);
            }
            // Layers (TLS) keep what they could not write yet.
            if self.client.is_layered() && Pin::new(&mut self.client).poll_flush(cx).is_pending() {
                return Poll::Pending;
            }
            if let Err(end) = ready!(self.poll_read_down(cx)) {
                return Poll::Ready(end);
            }
        }
    }

    fn poll_read_down(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            let read = ready!(Pin::new(&mut self.backend).poll_read(cx, &mut buffer));
            let chunk = buffer.filled();
            if read.is_err() || chunk.is_empty() {
                return Poll::Ready(self.server_closed());
            }
            self.walk_down(chunk)?;
            let mut rest = chunk;
            if self.to_client.is_empty() {
                // The usual case: written from where it was read to.
                let free = usize::try_from(self.released - self.to_client.base).unwrap_or(usize::MAX).min(chunk.len());
                if free > 0 && self.opening.verdict() == Verdict::Pass {
                    match Pin::new(&mut self.client).poll_write(cx, &chunk[..free]) {
                        Poll::Ready(Ok(count)) if count > 0 => {
                            self.to_client.base += count as u64;
                            rest = &chunk[count..];
                        }
                        Poll::Ready(_) => return Poll::Ready(Err(self.client_left())),
                        Poll::Pending => {}
                    }
                }
            }
            if !rest.is_empty() {
                self.to_client.push(rest);
            }
            Poll::Ready(Ok(()))
        })
    }

    fn walk_down(&mut self, chunk: &[u8]) -> Result<(), End> {
        // Before the walk: whatever a cancel did to an answer in this chunk, it was begun before the chunk was read.
        self.look_for_cancels();
        self.down
            .walk(chunk, &mut FromServer(&mut self.tracker))
            .map_err(|error| End::ServerViolation(error.to_string()))?;
        self.target.set_busy(self.tracker.in_flight());
        self.released = self.tracker.released(&self.down);
        if self.down.seen() - self.released > MOST_KEPT {
            self.tracker.let_kept_pass();
            self.released = self.tracker.released(&self.down);
        }
        Ok(())
    }

    fn look_for_cancels(&mut self) {
        let cancels = self.target.cancels();
        if cancels != self.cancels_seen {
            self.tracker.cancel_passed();
            // One that is still under way counts again the next time.
            self.cancels_seen = if self.target.cancel_under_way() { self.cancels_seen } else { cancels };
        }
    }

    fn poll_barrier(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        let barrier = &self.barrier;
        let counters = &self.counters;
        let waiting = self.waiting.get_or_insert_with(|| {
            Counters::one(&counters.doubtful);
            barrier.pass()
        });
        let passed = ready!(waiting.as_mut().poll(cx));
        self.waiting = None;
        Poll::Ready(match passed {
            Ok(()) => {
                self.tracker.barrier_returned();
                self.released = self.tracker.released(&self.down);
                Ok(())
            }
            Err(why) => Err(End::Unknown(why)),
        })
    }

    fn server_closed(&mut self) -> Result<(), End> {
        self.server_eof = true;
        if self.tracker.ends_in_doubt() {
            return Err(End::Unknown("PostgreSQL ended the session before it was certain".to_owned()));
        }
        self.tracker.release_all();
        self.released = self.down.seen();
        Ok(())
    }

    fn client_left(&self) -> End {
        End::Client { busy: self.tracker.in_flight() }
    }

    // === Client to PostgreSQL ===

    fn poll_up(&mut self, cx: &mut Context<'_>) -> Poll<End> {
        loop {
            while !self.to_backend.is_empty() {
                match self.opening.verdict() {
                    Verdict::Shut => return Poll::Ready(End::Shut),
                    Verdict::Hold => return Poll::Pending,
                    Verdict::Pass => {}
                }
                let bytes = self.to_backend.before(u64::MAX);
                match ready!(Pin::new(&mut self.backend).poll_write(cx, bytes)) {
                    // What it still has to say is read before the end is told.
                    Ok(0) | Err(_) => return Poll::Pending,
                    Ok(count) => self.to_backend.written(count),
                }
            }
            if self.backend.is_layered() && Pin::new(&mut self.backend).poll_flush(cx).is_pending() {
                return Poll::Pending;
            }
            if self.client_eof {
                // After Terminate PostgreSQL finishes what it was told and closes; without it the client is just gone.
                return if self.tracker.terminated { Poll::Pending } else { Poll::Ready(self.client_left()) };
            }
            if let Err(end) = ready!(self.poll_read_up(cx)) {
                return Poll::Ready(end);
            }
        }
    }

    fn poll_read_up(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), End>> {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut buffer = ReadBuf::new(scratch);
            match ready!(Pin::new(&mut self.client).poll_read(cx, &mut buffer)) {
                Err(_) => return Poll::Ready(Err(self.client_left())),
                Ok(()) if buffer.filled().is_empty() => {
                    self.client_eof = true;
                    return Poll::Ready(Ok(()));
                }
                Ok(()) => {}
            }
            let chunk = buffer.filled();
            self.walk_up(chunk)?;
            match Pin::new(&mut self.backend).poll_write(cx, chunk) {
                Poll::Ready(Ok(count)) if count == chunk.len() => self.to_backend.base += count as u64,
                Poll::Ready(Ok(count)) => {
                    self.to_backend.base += count as u64;
                    self.to_backend.push(&chunk[count..]);
                }
                Poll::Ready(Err(_)) | Poll::Pending => self.to_backend.push(chunk),
            }
            Poll::Ready(Ok(()))
        })
    }

    fn walk_up(&mut self, chunk: &[u8]) -> Result<(), End> {
        // Before the walk: one that has ended by now cannot hit what is only sent on from here.
        self.look_for_cancels();
        self.up
            .walk(chunk, &mut FromClient(&mut self.tracker))
            .map_err(|error| End::ClientViolation(error.to_string()))?;
        self.target.set_busy(self.tracker.in_flight());
        if self.named_setting.is_none() && self.tracker.named_synchronous_commit() {
            self.named_setting = Some(self.counters.hold(Gauge::SettingNamed));
        }
        Ok(())
    }

    // === The end ===

    /// May the client still be told something? Only between two messages, and only while the gate is open.
    pub fn may_speak(&self) -> bool {
        let told = self.to_client.before(self.released).is_empty();
        // What is kept back begins with a message, so what was passed ends with one.
        let between = self.released < self.down.seen() || self.down.at_boundary();
        self.opening.verdict() == Verdict::Pass && told && between
    }

    /// Is the stream to PostgreSQL between two messages, with all of it written?
    pub fn backend_boundary(&self) -> bool {
        self.up.at_boundary() && self.to_backend.is_empty() && !self.tracker.terminated
    }
}
