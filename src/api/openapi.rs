//! The OpenAPI document, made from the table of routes. `docs/openapi.json` is its golden copy.

use axum::Json;
use serde_json::{Map, Value, json};

use super::routes::{ROUTES, Route};

pub(super) async fn get() -> Json<Value> {
    Json(document())
}

pub fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        for method in route.method.names() {
            path[*method] = operation(route, method);
        }
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "pgvigil",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "One agent's view of its PostgreSQL cluster. Health checks answer 200 or 503 and take the paths and \
                parameters of Patroni; errors are {error, hint}.",
        },
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "properties": {"error": {"type": "string"}, "hint": {"type": "string"}},
                    "required": ["error"],
                },
            },
        },
    })
}

fn operation(route: &Route, method: &str) -> Value {
    let mut operation = json!({"summary": route.summary, "responses": responses(route, method)});
    let parameters = parameters(route);
    if !parameters.is_empty() {
        operation["parameters"] = Value::from(parameters);
    }
    if !route.body.is_empty() {
        operation["requestBody"] = json!({"content": {"application/json": {"schema": body(route)}}});
    }
    if route.method.changes_something() {
        operation["security"] = json!([{"token": []}]);
    }
    operation
}

fn responses(route: &Route, method: &str) -> Value {
    let mut responses = Map::new();
    for (code, text) in route.answers {
        responses.insert(code.to_string(), json!({"description": text}));
    }
    if route.method.changes_something() {
        responses.insert("401".to_owned(), json!({"description": "the token is missing or wrong"}));
        responses.insert(
            "403".to_owned(),
            json!({"description": "no token is configured, and the caller is not on this host"}),
        );
    }
    for (code, response) in &mut responses {
        // Status only for HEAD and OPTIONS; a refused check still answers with the member's document.
        let is_document = code.starts_with('2') || (code == "503" && method == "get");
        if !is_document && !matches!(method, "head" | "options") {
            response["content"] = json!({"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}});
        }
    }
    Value::Object(responses)
}

fn parameters(route: &Route) -> Vec<Value> {
    let in_path = route
        .path
        .split(['{', '}'])
        .nth(1)
        .map(|name| json!({"name": name, "in": "path", "required": true, "schema": {"type": "string"}}));
    let in_query = route
        .query
        .iter()
        .map(|(name, text)| json!({"name": name, "in": "query", "description": text, "schema": {"type": "string"}}));
    in_path.into_iter().chain(in_query).collect()
}

fn body(route: &Route) -> Value {
    let mut properties = Map::new();
    let mut required = Vec::new();
    for (name, text) in route.body {
        let bare = name.trim_end_matches('!');
        if bare != *name {
            required.push(bare);
        }
        let of_type = match bare {
            "timeout_ms" | "timeout" => "integer",
            "force" | "from_leader" | "restart_pending" => "boolean",
            _ => "string",
        };
        let property = match bare {
            "off" => json!({"type": "array", "items": {"type": "string"}, "description": text}),
            _ => json!({"type": of_type, "description": text}),
        };
        properties.insert(bare.to_owned(), property);
    }
    json!({"type": "object", "properties": properties, "required": required})
}
