//! What ordinary clients do, through the member that leads and through one that does not.

use super::*;

#[tokio::test(flavor = "multi_thread")]
async fn clients_reach_the_primary_through_every_member() {
    let (cluster, primary) = playing(options("direct = true")).await;
    for member in 0..cluster.members.len() {
        let session = through(&cluster, member).await;
        let row = session.query_one("SELECT pg_is_in_recovery(), inet_server_port()", &[]).await.unwrap();
        assert!(!row.get::<_, bool>(0), "{member}");
        session
            .execute("INSERT INTO writes (id, client) VALUES ($1, 1)", &[&(member as i64 + 1_000_000)])
            .await
            .unwrap();
    }
    let rows = said(&psql(cluster.members[primary].endpoint_port, &["-Atc", "SELECT count(*) FROM writes"]).await);
    assert_eq!(rows, "3");
    leaves_nothing(cluster).await;
}
