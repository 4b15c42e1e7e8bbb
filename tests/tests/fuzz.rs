//! What must hold for any bytes, for some that are random; `LOBBY_SEED` has others. Coverage-guided fuzzing of the same is
//! `cargo xtask fuzz`.

use tests::{fuzz, random::Random};

/// Puts pieces together at random, again and again; a failure tells the seed.
fn try_many(target: fn(&[u8]), pieces: &[&str]) {
    let seed = Random::seed(7);
    println!("LOBBY_SEED={seed}");
    let mut random = Random::new(seed);
    for _ in 0..20_000 {
        let mut data = Vec::new();
        for _ in 0..random.below(24) {
            match random.percent(90) {
                true => data.extend_from_slice(random.of(pieces).as_bytes()),
                false => data.push(random.next() as u8),
            }
        }
        target(&data);
    }
}

#[test]
fn a_path_has_one_form() {
    let pieces = [
        "/", "//", ".", "..", "a", "b", ";", "%", "%2", "%2e", "%2F", "%41", "%5c", "%C3", "\\", "\n/", "é",
        " ", "?",
    ];
    try_many(fuzz::path, &pieces);
}

#[test]
fn a_request_goes_the_narrowest_way() {
    let pieces = [
        "GET a.b/ x: 1\n",
        "GET a.b/ x: 2\n",
        "GET a.b/ x: 1 x: 2\n",
        "GET a.b/x/y\n",
        "POST c.a.b/x x: 1 y: 2\n",
        "PUT z/x/y/z\n",
        "GET ",
        "- ",
        "GET,POST ",
        "*",
        "*.",
        "a.b",
        "c.a.b",
        "/",
        "=/",
        "x",
        "y",
        "\n",
        " x: 1",
        " x: 2",
        " y: 2",
        " x: 1 x: 2",
        "- *.a.b/x\n",
        "- */\n",
        "GET a.b=/x\n",
    ];
    try_many(fuzz::route, &pieces);
}

#[test]
fn a_client_speaks_for_nobody_else() {
    let pieces = [
        "connection: ",
        "x-user",
        "X_User",
        "x-role: root\n",
        "te: trailers\n",
        "te: gzip\n",
        "keep-alive: 5\n",
        "x-forwarded-for: 1\n",
        "X_Forwarded_For: 1\n",
        "forwarded: for=1\n",
        "x-private: 1\n",
        "x-private",
        ", ",
        ": 1\n",
        ":",
        "\n",
        "proxy-a: 1\n",
        "upgrade: h2c\n",
        "transfer-encoding: chunked\n",
        "cookie: a=1\n",
        "accept: */*\n",
        "trailer: x-sum\n",
        "content-length",
    ];
    try_many(fuzz::headers, &pieces);
}
