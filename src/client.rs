//! Asking agents over HTTP: every address in turn until one answers, each question with a deadline. Used by the command
//! line and by the demo; no tasks of its own, every call may be dropped.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::header::{AUTHORIZATION, CONTENT_TYPE};
use hyper::{Method, Request, StatusCode};
use hyper_util::client::legacy::Client as Http;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::Value;

use crate::config::{Contact, Secret};

/// A member that does not take the connection within this is not worth waiting for: the next one is asked.
const CONNECT: Duration = Duration::from_millis(1_500);
/// Agents answer from memory; what takes longer is stuck.
const ANSWER: Duration = Duration::from_secs(5);
/// `/v1/decisions?full=true` has a few megabytes; more is not ours.
const LARGEST_ANSWER: usize = 64 << 20;

/// Errors by what the caller does about them.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody took the question.
    #[error("no agent answered: {}", .0.join("; "))]
    Unreachable(Vec<String>),
    /// It was sent and may have arrived (S11).
    #[error("the request was sent and nobody answered: {}", .0.join("; "))]
    Unknown(Vec<String>),
    /// An agent said no, in its own words.
    #[error("{error}")]
    Refused { status: StatusCode, error: String, hint: String },
    /// The address cannot be one.
    #[error("{url}: {why}")]
    NoUrl { url: String, why: String },
}

pub struct Client {
    http: Http<HttpConnector, Full<Bytes>>,
    /// `http://host:port`, the member on this host first.
    bases: Vec<String>,
    token: Option<Secret>,
}

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub body: Value,
}

/// Why one address gave no answer.
struct Silent {
    why: String,
    /// The question may have arrived.
    sent: bool,
}

impl Client {
    pub fn of(bases: Vec<String>) -> Client {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT));
        connector.set_nodelay(true);
        Client { http: Http::builder(TokioExecutor::new()).build(connector), bases, token: None }
    }

    pub fn with_token(self, token: Option<Secret>) -> Client {
        Client { token, ..self }
    }

    pub async fn get(&self, path: &str) -> Result<Answer, ClientError> {
        let mut unready = None;
        let mut silent = Vec::new();
        for base in &self.bases {
            match self.ask(base, Method::GET, path, None).await {
                // Starting, or cut off from the store: another member may know more.
                Ok(answer) if answer.status == StatusCode::SERVICE_UNAVAILABLE => unready = unready.or(Some(answer)),
                Ok(answer) => return Ok(answer),
                Err(Silent { why, .. }) => silent.push(format!("{base}: {why}")),
            }
        }
        unready.ok_or(ClientError::Unreachable(silent))
    }

    /// Every address' own answer, all asked at once, in the order of the addresses.
    pub async fn get_each(&self, path: &str) -> Vec<(String, Result<Value, String>)> {
        let questions = self.bases.iter().map(async |base| {
            let answer = match self.ask(base, Method::GET, path, None).await {
                Ok(answer) => answer.success().map_err(|error| error.to_string()),
                Err(silent) => Err(silent.why),
            };
            (base.clone(), answer)
        });
        futures_util::future::join_all(questions).await
    }

    /// One address' status and body; `None`: no answer.
    pub async fn look(&self, base: &str, path: &str, within: Duration) -> Option<(u16, Value)> {
        let answer = tokio::time::timeout(within, self.ask(base, Method::GET, path, None)).await.ok()?.ok()?;
        Some((answer.status.as_u16(), answer.body))
    }

    /// `body` carries a request id of ours, so asking a second member after a lost answer does nothing twice.
    pub async fn post(&self, path: &str, body: &Value) -> Result<Answer, ClientError> {
        let mut refused = None;
        let mut silent = Vec::new();
        let mut sent = false;
        for base in &self.bases {
            match self.ask(base, Method::POST, path, Some(body)).await {
                Ok(answer)
                    if [StatusCode::SERVICE_UNAVAILABLE, StatusCode::FORBIDDEN, StatusCode::UNAUTHORIZED]
                        .contains(&answer.status) =>
                {
                    refused = refused.or(Some(answer));
                }
                Ok(answer) => return Ok(answer),
                Err(error) => {
                    sent |= error.sent;
                    silent.push(format!("{base}: {}", error.why));
                }
            }
        }
        match refused {
            Some(answer) if !sent => Ok(answer),
            _ if sent => Err(ClientError::Unknown(silent)),
            _ => Err(ClientError::Unreachable(silent)),
        }
    }

    async fn ask(&self, base: &str, method: Method, path: &str, body: Option<&Value>) -> Result<Answer, Silent> {
        let broken = |why: String| Silent { why, sent: false };
        let mut request = Request::builder().method(method).uri(format!("{base}{path}"));
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.expose()));
        }
        let bytes = body.map(|b| Bytes::from(b.to_string())).unwrap_or_default();
        let request = request.body(Full::new(bytes)).map_err(|error| broken(error.to_string()))?;
        let exchange = async {
            let response = self.http.request(request).await.map_err(|error| {
                let sent = !error.is_connect();
                Silent { why: chain(&error), sent }
            })?;
            let status = response.status();
            let late = |why| Silent { why, sent: true };
            let body = Limited::new(response.into_body(), LARGEST_ANSWER);
            let bytes = body.collect().await.map_err(|error| late(error.to_string()))?.to_bytes();
            let body = serde_json::from_slice(&bytes)
                .map_err(|_| late(format!("answered {status} without JSON: is this a pgvigil agent?")))?;
            Ok(Answer { status, body })
        };
        match tokio::time::timeout(ANSWER, exchange).await {
            Ok(answer) => answer,
            Err(_) => Err(Silent { why: format!("no answer within {ANSWER:?}"), sent: true }),
        }
    }
}

impl Answer {
    /// The body of a success; anything else becomes an error with the agent's own words.
    pub fn success(self) -> Result<Value, ClientError> {
        if self.status.is_success() {
            return Ok(self.body);
        }
        let text = |key: &str| self.body.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let error = match text("error") {
            empty if empty.is_empty() => format!("the agent answered {}", self.status),
            words => words,
        };
        Err(ClientError::Refused { status: self.status, error, hint: text("hint") })
    }
}

/// The member on this host comes first: without a token only it takes requests that change something.
pub fn member_urls(contact: &Contact) -> Vec<String> {
    let url = |host: &str, port: u16| {
        if host.contains(':') { format!("http://[{host}]:{port}") } else { format!("http://{host}:{port}") }
    };
    let mut urls = Vec::new();
    if let Some(me) = contact.members.iter().find(|m| Some(&m.name) == contact.name.as_ref()) {
        urls.push(url("127.0.0.1", me.api_port));
    }
    urls.extend(contact.members.iter().map(|m| url(&m.host, m.api_port)));
    urls
}

/// `10.0.0.1`, `10.0.0.1:8008` and `http://10.0.0.1:8008/` all mean `http://10.0.0.1:8008`.
pub fn base(url: &str) -> Result<String, ClientError> {
    let wrong = |why: &str| Err(ClientError::NoUrl { url: url.to_owned(), why: why.to_owned() });
    let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
    match full.parse::<hyper::Uri>() {
        Ok(uri) if uri.scheme_str() != Some("http") => wrong("only http:// is spoken"),
        Ok(uri) if uri.host().is_none() => wrong("has no host"),
        Ok(uri) if uri.port_u16().is_none() => Ok(format!("{}:8008", full.trim_end_matches('/'))),
        Ok(_) => Ok(full.trim_end_matches('/').to_owned()),
        Err(error) => wrong(&error.to_string()),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    // hyper's outermost words say nothing ("client error (Connect)"); the innermost say what happened.
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
