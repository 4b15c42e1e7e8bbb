//! Clients that take their time with an answer, and those that do not take it at all.

use std::{
    io::{Read as _, Write as _},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http::{Request, Response};
use lb_userspace::model::desk::Speech;
use tests::{
    desk::{Deed, Desk, HASTY, Recorder, Settings, backend},
    multiplex::{Exchange, Multiplex},
    requests::Speaker,
};
use tokio::net::TcpStream;

/// For an eighth of a megabyte, with who reads slowly.
const PAUSE: Duration = Duration::from_millis(200);

/// Who does not read loses the answer, and the server is rid of it, by whatever protocol it was asked for.
#[test]
fn who_does_not_read_loses_the_answer() -> Result<()> {
    let (tell, told) = std::sync::mpsc::channel();
    let server = Multiplex::start(None, 100, move |mut it: Exchange| {
        let tell = tell.clone();
        async move {
            let mut sender = it.respond.send_response(Response::new(()), false)?;
            // For as long as somebody takes it.
            let ended = loop {
                sender.reserve_capacity(64 << 10);
                match std::future::poll_fn(|context| sender.poll_capacity(context)).await {
                    Some(Ok(room)) => sender.send_data(Bytes::from(vec![1; room]), false)?,
                    other => break format!("{other:?}"),
                }
            };
            tell.send(ended)?;
            Ok(())
        }
    })?;
    let speech = Speech { http2: true, tls: None, proxy: None };
    let settings = Settings { speech, ..Settings::default() };
    let desk = Desk::with(settings, HASTY, &[("web", vec![backend(server.address)])], &[])?;
    let mut reader = Speaker::to(desk.addresses[0])?;
    reader.say(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")?;
    let by_lines = told.recv_timeout(Duration::from_secs(20)).context("the server still has it")?;
    desk.report(|report| report.refused.get("unread") == Some(&1))?;
    drop(reader);

    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let held = runtime.block_on(async {
        let stream = TcpStream::connect(desk.addresses[0]).await?;
        let (mut client, connection) = h2::client::handshake(stream).await?;
        let connection = tokio::spawn(connection);
        client = client.ready().await?;
        let (answer, _) = client.send_request(Request::get("http://shop.example/large").body(())?, true)?;
        // Its window is never opened again.
        anyhow::Ok((answer.await?, client, connection))
    })?;
    let by_streams = told.recv_timeout(Duration::from_secs(20)).context("the server still has it")?;
    println!("the server has heard {by_lines} and {by_streams}");
    desk.report(|report| report.refused.get("unread") == Some(&2))?;
    let (_answer, _client, connection) = held;
    // It has nothing else to do, though it is there and says so.
    let ended = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(20), connection).await });
    assert!(ended.is_ok(), "the connection is kept");
    desk.report(|report| report.open == 0)?;
    Ok(())
}

/// Who reads slowly gets all of it, though it takes far longer than a body may rest.
#[test]
fn who_reads_slowly_is_waited_for() -> Result<()> {
    const LENGTH: usize = 6 << 20;
    let large =
        [format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n").into_bytes(), vec![1; LENGTH]]
            .concat();
    let server = Recorder::start(move |_| Deed::Say(large.clone()))?;
    let desk = Desk::with(Settings::default(), HASTY, &[("web", vec![backend(server.address)])], &[])?;
    let address = desk.addresses[0];
    let by_lines = std::thread::spawn(move || -> Result<usize> {
        let mut stream = std::net::TcpStream::connect(address)?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")?;
        let (mut heard, mut piece) = (0, vec![0; 128 << 10]);
        loop {
            let length = stream.read(&mut piece)?;
            if length == 0 {
                return Ok(heard);
            }
            heard += length;
            std::thread::sleep(PAUSE * length as u32 / piece.len() as u32);
        }
    });
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let by_streams = runtime.block_on(async {
        let stream = TcpStream::connect(address).await?;
        let (mut client, connection) = h2::client::handshake(stream).await?;
        tokio::spawn(connection);
        client = client.ready().await?;
        let (answer, _) = client.send_request(Request::get("http://shop.example/").body(())?, true)?;
        let (mut body, mut heard) = (answer.await?.into_body(), 0);
        while let Some(part) = body.data().await {
            let length = part?.len();
            heard += length;
            tokio::time::sleep(PAUSE * length as u32 / (128 << 10)).await;
            body.flow_control().release_capacity(length)?;
        }
        anyhow::Ok(heard)
    })?;
    assert_eq!(by_streams, LENGTH);
    let by_lines = by_lines.join().map_err(|_| anyhow::anyhow!("it panicked"))??;
    ensure!(by_lines > LENGTH, "{by_lines} bytes of {LENGTH} and a head");
    Ok(())
}
