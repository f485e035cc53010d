// Package openaitest is a stateful simulator of OpenAI's Admin API, with just
// enough of the inference side to tell whether a key works.
//
// It owns the answers that the engine's tests, the demo and the benchmark
// believe. Two things must stay true: what OpenAI documents is answered as
// documented (the contract test holds every answer against the published
// document), and what OpenAI leaves open is answered in the way that is harder
// on the caller, and said so where it is decided.
//
// Decisions where the documents are silent:
//
//   - A request is judged in this order: route, method, rate limit, fault,
//     authentication, permission, query, body, existence. A 429 therefore
//     never uses up a fault, and a key without the permission gets 403 for
//     things that do not exist.
//   - A key dies at its expires_at, which is the second of its creation plus
//     expires_in_seconds: up to one second early, never late.
//   - An expired key stays listed, with its expires_at in the past, until it is
//     deleted; it can be deleted but not updated.
//   - A list without owner_project_access hides keys whose owner has no access
//     to the project (accounts with role "none").
//   - A page cursor that once existed keeps its place after its deletion; one
//     that never existed in that list is a 400.
//   - Everything under an archived project answers 400 project_archived, reads
//     and deletes included; only the project itself can still be read.
//   - Unknown query parameters are refused like unknown body fields.
//   - Scopes are taken verbatim, but one that is not dotted lower-case words is
//     refused by name.
//   - Admin keys made over HTTP have all permissions unless SetNewAdminKeys
//     says otherwise.
package openaitest
