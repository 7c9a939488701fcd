//! A connection to PostgreSQL that this crate drives itself: simple queries and replication commands in text form.
//!
//! Why not tokio-postgres: it has no replication mode (the timeline that a standby replays is only told by
//! IDENTIFY_SYSTEM), it needs a task beside every connection, and its deadlines cover the socket's connect only.
//! A session runs no task. Dropping a future in the middle leaves the session unusable, and it says so itself
//! (`usable`); its owner then opens another one.

use std::path::PathBuf;
use std::str::FromStr;

use bytes::{Buf, Bytes, BytesMut};
use postgres_protocol::authentication::sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, timeout_at};

use crate::config::Secret;
use crate::ports::PostgresError;

/// Answers to our own queries are small. A frame beyond this is not PostgreSQL, or not an answer that we asked for.
const MAX_FRAME: usize = 64 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Socket { directory: PathBuf, port: u16 },
    Network { host: String, port: u16 },
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Socket { directory, port } => write!(f, "{}/.s.PGSQL.{port}", directory.display()),
            Address::Network { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// As whom, where to, and with which settings.
#[derive(Clone, Debug)]
pub struct Login {
    pub address: Address,
    pub user: String,
    pub password: Secret,
    pub database: String,
    /// Physical replication: IDENTIFY_SYSTEM is understood, SQL is not.
    pub replication: bool,
    pub application_name: String,
    /// Settings for this session, sent with the first message.
    pub settings: Vec<(&'static str, &'static str)>,
}

#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("no answer before the deadline")]
    Timeout,
    /// Nobody listens, or the connection broke.
    #[error("{0}")]
    Gone(String),
    /// PostgreSQL's own word.
    #[error("{message} (SQLSTATE {code}){detail}")]
    Server { code: String, message: String, detail: String },
    /// An answer that this code does not understand.
    #[error("{0}")]
    Unexpected(String),
}

impl SessionError {
    pub fn code(&self) -> Option<&str> {
        match self {
            SessionError::Server { code, .. } => Some(code),
            SessionError::Timeout | SessionError::Gone(_) | SessionError::Unexpected(_) => None,
        }
    }

    /// The port's error for an attempt at `what`, whose deadline was `within` long.
    pub fn during(self, what: impl Into<String>, within: std::time::Duration) -> PostgresError {
        let what = what.into();
        match self {
            SessionError::Timeout => PostgresError::Timeout { what, within },
            SessionError::Gone(why) => PostgresError::Unavailable { what, why },
            // 57P01..57P03: shutting down, crashed, starting. 53300: full. None of them is an answer to the command.
            SessionError::Server { ref code, .. } if matches!(code.as_str(), "57P01" | "57P02" | "57P03" | "53300") => {
                PostgresError::Unavailable { what, why: self.to_string() }
            }
            SessionError::Server { .. } | SessionError::Unexpected(_) => {
                PostgresError::Refused { what, why: self.to_string() }
            }
        }
    }
}

/// One statement's rows.
#[derive(Debug, Default)]
pub struct Rows {
    columns: Vec<String>,
    rows: Vec<Vec<Option<String>>>,
}

impl Rows {
    pub fn iter(&self) -> impl Iterator<Item = Row<'_>> {
        self.rows.iter().map(|values| Row { columns: &self.columns, values })
    }

    pub fn first(&self) -> Option<Row<'_>> {
        self.iter().next()
    }

    pub fn one(&self) -> Result<Row<'_>, SessionError> {
        self.first().ok_or_else(|| SessionError::Unexpected("no row where one was expected".to_owned()))
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// Columns are read by name: a query may gain one without any reader noticing.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    columns: &'a [String],
    values: &'a [Option<String>],
}

impl<'a> Row<'a> {
    /// The value, or `None` for NULL.
    pub fn optional(&self, column: &str) -> Result<Option<&'a str>, SessionError> {
        let at = self.columns.iter().position(|c| c == column);
        let at = at.ok_or_else(|| SessionError::Unexpected(format!("no column `{column}` in the answer")))?;
        Ok(self.values.get(at).and_then(|v| v.as_deref()))
    }

    pub fn text(&self, column: &str) -> Result<&'a str, SessionError> {
        self.optional(column)?.ok_or_else(|| SessionError::Unexpected(format!("column `{column}` is null")))
    }

    pub fn parsed<T: FromStr>(&self, column: &str) -> Result<T, SessionError> {
        parse(column, self.text(column)?)
    }

    pub fn parsed_optional<T: FromStr>(&self, column: &str) -> Result<Option<T>, SessionError> {
        self.optional(column)?.map(|text| parse(column, text)).transpose()
    }

    pub fn flag(&self, column: &str) -> Result<bool, SessionError> {
        match self.text(column)? {
            "t" => Ok(true),
            "f" => Ok(false),
            other => Err(SessionError::Unexpected(format!("column `{column}` is `{other}`, not a boolean"))),
        }
    }
}

fn parse<T: FromStr>(column: &str, text: &str) -> Result<T, SessionError> {
    text.parse().map_err(|_| SessionError::Unexpected(format!("column `{column}` cannot be read: `{text}`")))
}

trait Wire: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Wire for T {}

pub struct Session {
    wire: Box<dyn Wire>,
    received: BytesMut,
    /// Process id of the backend, as PostgreSQL counts them.
    pub backend: i32,
    usable: bool,
}

impl Session {
    pub async fn open(login: &Login, deadline: Instant) -> Result<Session, SessionError> {
        timeout_at(deadline, Session::connect(login)).await.map_err(|_| SessionError::Timeout)?
    }

    async fn connect(login: &Login) -> Result<Session, SessionError> {
        let gone = |e: std::io::Error| SessionError::Gone(format!("connect to {}: {e}", login.address));
        let wire: Box<dyn Wire> = match &login.address {
            Address::Socket { directory, port } => {
                let path = directory.join(format!(".s.PGSQL.{port}"));
                Box::new(UnixStream::connect(&path).await.map_err(gone)?)
            }
            Address::Network { host, port } => {
                let stream = TcpStream::connect((host.as_str(), *port)).await.map_err(gone)?;
                stream.set_nodelay(true).map_err(gone)?;
                Box::new(stream)
            }
        };
        let mut session = Session { wire, received: BytesMut::with_capacity(8192), backend: 0, usable: false };
        session.log_in(login).await?;
        session.usable = true;
        Ok(session)
    }

    async fn log_in(&mut self, login: &Login) -> Result<(), SessionError> {
        let mut parameters = vec![
            ("user", login.user.as_str()),
            ("application_name", login.application_name.as_str()),
            ("client_encoding", "UTF8"),
        ];
        if login.replication {
            parameters.push(("replication", "true"));
        } else {
            parameters.push(("database", login.database.as_str()));
            parameters.extend(login.settings.iter().copied());
        }
        let mut message = BytesMut::new();
        frontend::startup_message(parameters, &mut message).map_err(unsendable)?;
        self.send(&message).await?;
        let mut scram: Option<ScramSha256> = None;
        loop {
            let (tag, mut body) = self.frame().await?;
            match tag {
                b'R' => self.authenticate(&mut body, login, &mut scram).await?,
                b'K' if body.remaining() >= 8 => self.backend = body.get_i32(),
                b'E' => return Err(server_error(&body)),
                b'Z' => return Ok(()),
                _ => {}
            }
        }
    }

    async fn authenticate(
        &mut self,
        body: &mut Bytes,
        login: &Login,
        scram: &mut Option<ScramSha256>,
    ) -> Result<(), SessionError> {
        if body.remaining() < 4 {
            return Err(SessionError::Unexpected("short authentication message".to_owned()));
        }
        let unsound = |e: std::io::Error| SessionError::Unexpected(format!("scram exchange: {e}"));
        let mut message = BytesMut::new();
        match (body.get_i32(), scram) {
            (0, _) => return Ok(()),
            (10, scram) => {
                let password = login.password.expose().as_bytes();
                let exchange = scram.insert(ScramSha256::new(password, ChannelBinding::unsupported()));
                frontend::sasl_initial_response(SCRAM_SHA_256, exchange.message(), &mut message).map_err(unsendable)?;
            }
            (11, Some(exchange)) => {
                exchange.update(body).map_err(unsound)?;
                frontend::sasl_response(exchange.message(), &mut message).map_err(unsendable)?;
            }
            (12, Some(exchange)) => return exchange.finish(body).map_err(unsound),
            (other, _) => {
                return Err(SessionError::Unexpected(format!(
                    "the server asks for authentication method {other}; only scram-sha-256 and peer are spoken: \
                     see the pg_hba.conf in the state directory"
                )));
            }
        }
        self.send(&message).await
    }

    pub fn usable(&self) -> bool {
        self.usable
    }

    /// Rows of the last statement of `sql`.
    pub async fn query(&mut self, sql: &str, deadline: Instant) -> Result<Rows, SessionError> {
        self.query_all(sql, deadline).await.map(|mut all| all.pop().unwrap_or_default())
    }

    /// One round trip, one set of rows for each statement of `sql`.
    pub async fn query_all(&mut self, sql: &str, deadline: Instant) -> Result<Vec<Rows>, SessionError> {
        if !self.usable {
            return Err(SessionError::Gone("the session was given up in the middle of an earlier query".to_owned()));
        }
        // Not usable until ReadyForQuery: a future dropped on the way must not leave half an answer to the next query.
        self.usable = false;
        let answer = timeout_at(deadline, self.exchange(sql)).await.map_err(|_| SessionError::Timeout)?;
        if matches!(answer, Ok(_) | Err(SessionError::Server { .. })) {
            self.usable = true;
        }
        answer
    }

    async fn exchange(&mut self, sql: &str) -> Result<Vec<Rows>, SessionError> {
        let mut message = BytesMut::new();
        frontend::query(sql, &mut message).map_err(unsendable)?;
        self.send(&message).await?;
        let mut all = Vec::new();
        let mut rows = Rows::default();
        let mut error = None;
        loop {
            let (tag, body) = match self.frame().await {
                Ok(frame) => frame,
                // FATAL: the server says why, then closes. The reason is worth more than "connection closed".
                Err(gone) => return Err(fatal(error, gone)),
            };
            match tag {
                b'T' => rows.columns = row_description(body)?,
                b'D' => rows.rows.push(data_row(body)?),
                b'C' => all.push(std::mem::take(&mut rows)),
                b'E' => error = Some(server_error(&body)),
                b'Z' => return error.map_or(Ok(all), Err),
                _ => {}
            }
        }
    }

    async fn send(&mut self, message: &[u8]) -> Result<(), SessionError> {
        self.wire.write_all(message).await.map_err(|e| SessionError::Gone(format!("send: {e}")))
    }

    async fn frame(&mut self) -> Result<(u8, Bytes), SessionError> {
        loop {
            if self.received.len() >= 5 {
                let length =
                    u32::from_be_bytes([self.received[1], self.received[2], self.received[3], self.received[4]]);
                let length = length as usize;
                if !(4..=MAX_FRAME).contains(&length) {
                    return Err(SessionError::Unexpected(format!("a message of {length} bytes: not postgresql")));
                }
                if self.received.len() > length {
                    let mut frame = self.received.split_to(length + 1).freeze();
                    let tag = frame.get_u8();
                    frame.advance(4);
                    return Ok((tag, frame));
                }
                self.received.reserve(length + 1 - self.received.len());
            }
            match self.wire.read_buf(&mut self.received).await {
                Ok(0) => return Err(SessionError::Gone("connection closed by the server".to_owned())),
                Ok(_) => {}
                Err(e) => return Err(SessionError::Gone(format!("receive: {e}"))),
            }
        }
    }
}

fn unsendable(e: std::io::Error) -> SessionError {
    SessionError::Unexpected(format!("build message: {e}"))
}

fn fatal(told: Option<SessionError>, gone: SessionError) -> SessionError {
    match told {
        // As `Gone`, so that the session is not used again; the text keeps the SQLSTATE.
        Some(reason) => SessionError::Gone(reason.to_string()),
        None => gone,
    }
}

fn short() -> SessionError {
    SessionError::Unexpected("a message that ends too early".to_owned())
}

fn c_string(body: &mut Bytes) -> Result<String, SessionError> {
    let end = body.iter().position(|b| *b == 0).ok_or_else(short)?;
    let text = body.split_to(end);
    body.advance(1);
    Ok(String::from_utf8_lossy(&text).into_owned())
}

fn row_description(mut body: Bytes) -> Result<Vec<String>, SessionError> {
    let count = body.try_get_i16().map_err(|_| short())?;
    let mut columns = Vec::new();
    for _ in 0..count {
        columns.push(c_string(&mut body)?);
        // Table, attribute, type, its size and modifier, format: all answers are text, nothing of it is needed.
        if body.remaining() < 18 {
            return Err(short());
        }
        body.advance(18);
    }
    Ok(columns)
}

fn data_row(mut body: Bytes) -> Result<Vec<Option<String>>, SessionError> {
    let count = body.try_get_i16().map_err(|_| short())?;
    let mut values = Vec::new();
    for _ in 0..count {
        let length = body.try_get_i32().map_err(|_| short())?;
        let Ok(length) = usize::try_from(length) else {
            values.push(None);
            continue;
        };
        if body.remaining() < length {
            return Err(short());
        }
        values.push(Some(String::from_utf8_lossy(&body.split_to(length)).into_owned()));
    }
    Ok(values)
}

fn server_error(body: &Bytes) -> SessionError {
    let mut body = body.clone();
    let (mut code, mut message, mut detail) = (String::new(), String::new(), String::new());
    while body.has_remaining() {
        let field = body.get_u8();
        if field == 0 {
            break;
        }
        let Ok(text) = c_string(&mut body) else { break };
        match field {
            b'C' => code = text,
            b'M' => message = text,
            b'D' => detail.push_str(&format!("; detail: {text}")),
            b'H' => detail.push_str(&format!("; hint: {text}")),
            _ => {}
        }
    }
    SessionError::Server { code, message, detail }
}
