//! The writers alone, against servers that somebody else runs: one probe for us and for rivals (scripts/compare).
//! One order a line on standard input, one JSON document a line as the answer; the end of the input ends it.
//!
//! ```text
//! mark         what follows counts from now
//! written      waits for the acknowledgement of a write that was sent after the mark
//! report       longest time without an acknowledged write since the mark, errors, acknowledged rows that are lost
//! ```

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};

use super::sql::{self, Login};
use super::writer::{Address, Ids, Writer};
use super::{CLIENTS, DemoError};

/// A host's loss may take as long as a rival's time to live, and its second try.
const PATIENCE: Duration = Duration::from_secs(120);
const CONNECT: Duration = Duration::from_secs(3);

/// `addresses` as a DSN with several hosts and `target_session_attrs=read-write` would name them; one for a proxy.
pub async fn run(addresses: Vec<(String, SocketAddr)>) -> Result<(), DemoError> {
    let addresses: Vec<Address> = addresses.into_iter().map(|(member, at)| Address { member, at }).collect();
    let mut writer =
        Writer::start(addresses.clone(), &Login::app(), &Ids::after(i64::from(std::process::id()) << 32), CLIENTS);
    let mut orders = BufReader::new(tokio::io::stdin()).lines();
    let mut answers = tokio::io::stdout();
    let failed = |error| DemoError::failed("speak with whoever runs the probe", error);
    let mut mark = Instant::now();
    while let Some(order) = orders.next_line().await.map_err(failed)? {
        let answer = match order.trim() {
            "mark" => {
                mark = Instant::now();
                json!({ "marked": true })
            }
            "written" => json!({ "written": writer.acknowledged_after(mark, PATIENCE).await }),
            "report" => report(&writer, &addresses, mark).await,
            other => json!({ "error": format!("no order `{other}`: mark, written or report") }),
        };
        answers.write_all(format!("{answer}\n").as_bytes()).await.map_err(failed)?;
        answers.flush().await.map_err(failed)?;
    }
    writer.stop().await;
    Ok(())
}

async fn report(writer: &Writer, addresses: &[Address], mark: Instant) -> Value {
    let outage = writer.outage(mark);
    let (errors, kinds) = writer.errors(mark);
    let mut lost = Value::Null;
    for address in addresses {
        // A standby may lag: only the server that takes writes has to have everything.
        let Ok(session) = sql::connect_to(address.at, &Login::app(), CONNECT).await else { continue };
        match session.query_one("SELECT pg_is_in_recovery()", &[]).await {
            Ok(row) if !row.get::<_, bool>(0) => {}
            _ => continue,
        }
        if let Ok(checked) = writer.check(&session).await {
            lost = json!(checked.lost.len());
            break;
        }
    }
    json!({
        "write_outage_ms": (outage.as_secs_f64() * 10_000.0).round() / 10.0,
        "errors": errors,
        "error_kinds": kinds,
        "acknowledged": writer.acknowledged(),
        "lost_rows": lost,
        "two_primaries": writer.two_primaries(),
    })
}
