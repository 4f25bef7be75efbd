//! A relay whose accepted sockets pass through hands that do TLS: here hands that change nothing.

use corelane_codec::control_message::PayloadCodec;
use corelane_engine::adopt::{Adoption, Errand, Insecure, Ticket};
use corelane_engine::command::Command;
use corelane_engine::directory::{Ack, Policy};
use corelane_engine::mesh::Receiver;

use crate::common::{Router, rings, wait_until};
use crate::ends;
use crate::lab::{Lab, answer, drained};

/// Gives the next socket back as it came.
fn give_back(router: &Router, errands: &Receiver<Errand>) -> Ticket {
    let mut next = None;
    wait_until("a socket is handed out", || {
        next = errands.next();
        next.is_some()
    });
    let Some(Errand::Handshake(Insecure { socket, ticket, .. })) = next else {
        panic!("{next:?} is no handshake");
    };
    let adoption = Adoption::Socket(socket);
    let adopt = Command::Adopt { ticket, adoption };
    assert!(router.handle.command(adopt).is_ok());
    ticket
}

/// What a worker had sent before it reset its connection was lost when the word of the reset
/// overtook the bytes.
#[test]
fn a_reset_that_overtakes_the_last_bytes_of_a_response_costs_none_of_them() {
    for ring in rings() {
        let mut router = Router::with(ring, |config| {
            config.relay_home = Some(ends::home());
            config.secure_accepts = true;
        });
        let errands = router.handle.insecure.take().unwrap();
        let mut lab = Lab::before(router, Policy::RoundRobin, Ack::OnForward, 1, |_| {});
        give_back(&lab.router, &errands);
        let (_, asked) = lab.asked();
        let mut worker = asked.call_home();
        let ticket = give_back(&lab.router, &errands);
        let answer = answer(3, PayloadCodec::Json);
        let (first, last) = answer.split_at(answer.len() - 20);
        worker.say(first);
        let mut caller = lab.called();
        caller.handshake();
        let errno = libc::ECONNRESET;
        let commands = [Command::Broken { ticket, errno }, Command::Drain];
        for command in commands {
            assert!(lab.router.handle.command(command).is_ok());
        }
        let draining = &lab.router.handle.stats.shard.draining;
        wait_until("both commands were taken", || draining.get() == 1);
        worker.say(last);
        drop(worker);
        assert_eq!(drained(&mut caller), answer);
        drop(caller);
        lab.empty();
    }
}
