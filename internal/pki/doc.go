// Package pki makes and renews the certificates with which the controller and
// the node agents know each other. It knows neither Kubernetes nor gRPC: its
// state is three files of PEM, and where they are kept is the caller's business.
//
// # Support
//
// ECDSA P-256, TLS 1.3 only, both sides authenticated. A certificate names one
// role, as its only DNS name, and one direction: a node agent's serves, the
// controller's calls.
//
// # Terms
//
// An authority is a set of CA certificates with their keys: one in quiet times,
// two while one follows another. A bundle is the CA certificates that a peer
// trusts. An identity is what one side of a connection needs: a certificate, its
// key and a bundle.
//
// # Concurrency
//
// Everything is immutable or safe for use by many goroutines at once.
//
// # Durability / Failure
//
// Rotation needs no restart and no moment in which the two sides disagree:
//
//	day   0  CA one is made, and signs
//	day 243  CA two is made and joins the bundle; CA one signs on
//	day 244  CA two signs: by now everyone trusts both
//	day 365  CA one expires and leaves the bundle
//
// A certificate is renewed when two thirds of its life are over, or when its CA
// does not sign any more. Connections that stand are not touched; the next
// handshake uses what is current.
//
// # Spec
//
// RFC 5280 (certificates), RFC 8446 (TLS 1.3).
package pki
