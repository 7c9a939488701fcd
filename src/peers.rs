//! The way to the other agents: HTTP on the port that they serve their API on, one kept connection per member.
//!
//! A question waits for nothing but its own connection. Whoever drops a call drops the connection with it, because half an
//! answer would be taken for the next one's. Each connection has a task that ends with it.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HOST};
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{Mutex, watch};
use tokio::time::timeout;
use tracing::debug;

use crate::config::{Config, MemberAddress, Secret};
use crate::core::names::MemberName;
use crate::core::peers::{Answer, PATH, Question, Tried, VERSION};
use crate::ports::{PeerError, Peers};

/// An answer has a kilobyte; more is not ours.
const LARGEST_ANSWER: usize = 64 << 10;

/// Speaks to the agents of the member list.
pub struct HttpPeers {
    members: BTreeMap<MemberName, Arc<Line>>,
    token: Option<Secret>,
}

struct Line {
    address: MemberAddress,
    /// Held for the length of an exchange: one question at a time.
    kept: Mutex<Option<SendRequest<Full<Bytes>>>>,
    /// The number of the connection that is there; its own task takes it away.
    up: watch::Sender<Option<u64>>,
    connections: AtomicU64,
}

impl HttpPeers {
    pub fn new(config: &Config) -> HttpPeers {
        let others = config.members.iter().filter(|m| m.name != config.name);
        HttpPeers::to(others.cloned(), config.api.token.clone())
    }

    pub fn to(members: impl IntoIterator<Item = MemberAddress>, token: Option<Secret>) -> HttpPeers {
        let line = |address: MemberAddress| Line {
            address,
            kept: Mutex::default(),
            up: watch::Sender::new(None),
            connections: AtomicU64::new(0),
        };
        HttpPeers { members: members.into_iter().map(|m| (m.name.clone(), Arc::new(line(m)))).collect(), token }
    }

    fn line(&self, member: &MemberName) -> Result<&Arc<Line>, PeerError> {
        let unknown = || PeerError::Foreign { member: member.clone(), why: "not in the member list".to_owned() };
        self.members.get(member).ok_or_else(unknown)
    }
}

#[async_trait]
impl Peers for HttpPeers {
    async fn ask(&self, member: &MemberName, question: &Question, within: Duration) -> Result<Answer, PeerError> {
        let line = self.line(member)?;
        let silent = |why: String| PeerError::Silent { member: member.clone(), why };
        let body = serde_json::to_vec(question).map_err(|e| silent(format!("write the question: {e}")))?;
        let exchange = line.exchange(self.token.as_ref(), body.into());
        let (status, body) = match timeout(within, exchange).await {
            Err(_) => return Err(silent(format!("nothing within {within:?}"))),
            Ok(Err(Failure::Refused)) => return Err(PeerError::Refused { member: member.clone() }),
            Ok(Err(Failure::Broken(why))) => return Err(silent(why)),
            Ok(Ok(answered)) => answered,
        };
        check(member, question, status, &body)
    }

    async fn knock(&self, member: &MemberName, within: Duration) -> Tried {
        let Ok(line) = self.line(member) else { return Tried::Silent };
        match timeout(within, TcpStream::connect((line.address.host.as_str(), line.address.port))).await {
            Ok(Ok(_)) => Tried::Opened,
            Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => Tried::Refused,
            Ok(Err(_)) | Err(_) => Tried::Silent,
        }
    }

    async fn parted(&self, member: &MemberName) {
        let Ok(line) = self.line(member) else { return };
        // The sender lives as long as the line, so this only ends by the word.
        let _ = line.up.subscribe().wait_for(Option::is_none).await;
    }

    fn separate(&self) -> Box<dyn Peers> {
        Box::new(HttpPeers::to(self.members.values().map(|line| line.address.clone()), self.token.clone()))
    }
}

enum Failure {
    Refused,
    Broken(String),
}

impl Line {
    async fn exchange(
        self: &Arc<Line>,
        token: Option<&Secret>,
        question: Bytes,
    ) -> Result<(StatusCode, Bytes), Failure> {
        let mut kept = self.kept.lock().await;
        // Taken out while it is used: a call that is dropped in the middle takes the connection with it.
        if let Some(mut sender) = kept.take().filter(|sender| !sender.is_closed())
            && let Ok(answered) = self.send(&mut sender, token, question.clone()).await
        {
            *kept = Some(sender);
            return Ok(answered);
        }
        // The kept connection was of an agent that is gone: how the host takes a new one tells what is there now.
        let mut sender = self.connect().await?;
        let answered = self.send(&mut sender, token, question).await.map_err(Failure::Broken)?;
        *kept = Some(sender);
        Ok(answered)
    }

    async fn connect(self: &Arc<Line>) -> Result<SendRequest<Full<Bytes>>, Failure> {
        let MemberAddress { host, api_port, .. } = &self.address;
        let stream = TcpStream::connect((host.as_str(), *api_port)).await.map_err(|error| match error.kind() {
            ErrorKind::ConnectionRefused => Failure::Refused,
            _ => Failure::Broken(format!("connect: {error}")),
        })?;
        let broken = |what: &str, why: String| Failure::Broken(format!("{what}: {why}"));
        stream.set_nodelay(true).map_err(|e| broken("set TCP_NODELAY", e.to_string()))?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| broken("begin HTTP", e.to_string()))?;
        let number = self.connections.fetch_add(1, Ordering::Relaxed);
        self.up.send_replace(Some(number));
        let line = self.clone();
        // Ends with the connection, which ends when its sender is dropped or the other side closes.
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                debug!(member = %line.address.name, %error, "connection to an agent ended");
            }
            // Unless another one has taken its place.
            line.up.send_if_modified(|up| *up == Some(number) && up.take().is_some());
        });
        Ok(sender)
    }

    async fn send(
        &self,
        sender: &mut SendRequest<Full<Bytes>>,
        token: Option<&Secret>,
        question: Bytes,
    ) -> Result<(StatusCode, Bytes), String> {
        let mut request = Request::post(PATH).header(HOST, &self.address.host).header(CONTENT_TYPE, "application/json");
        if let Some(token) = token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.expose()));
        }
        let request = request.body(Full::new(question)).map_err(|e| e.to_string())?;
        sender.ready().await.map_err(|e| e.to_string())?;
        let response = sender.send_request(request).await.map_err(|e| innermost(&e))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), LARGEST_ANSWER).collect().await.map_err(|e| e.to_string())?;
        Ok((status, body.to_bytes()))
    }
}

/// S7: an answer counts when it comes from this member of this cluster.
fn check(member: &MemberName, question: &Question, status: StatusCode, body: &[u8]) -> Result<Answer, PeerError> {
    let foreign = |why: String| PeerError::Foreign { member: member.clone(), why };
    if status == StatusCode::SERVICE_UNAVAILABLE {
        return Err(PeerError::Silent { member: member.clone(), why: "its agent is starting".to_owned() });
    }
    if status != StatusCode::OK {
        return Err(foreign(format!("answered {status}: {}", String::from_utf8_lossy(body))));
    }
    let answer: Answer =
        serde_json::from_slice(body).map_err(|e| foreign(format!("its answer is not readable: {e}")))?;
    if answer.version != VERSION {
        return Err(foreign(format!(
            "speaks version {} of the agents' messages, here it is {VERSION}",
            answer.version
        )));
    }
    if answer.cluster != question.cluster || answer.from.name != *member {
        return Err(foreign(format!("{} of cluster {} answers at its address", answer.from.name, answer.cluster)));
    }
    match (answer.system_identifier, question.system_identifier) {
        (Some(theirs), Some(ours)) if theirs != ours => {
            Err(foreign(format!("has the system identifier {theirs}, here it is {ours}")))
        }
        _ => Ok(answer),
    }
}

fn innermost(error: &hyper::Error) -> String {
    error.source().map_or_else(|| error.to_string(), |source| source.to_string())
}
