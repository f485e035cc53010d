// Package openaitest is a stateful simulator of OpenAI's Admin API, with the part of the
// inference API that is needed to check whether a key works. The engine's tests, the demo
// and the benchmark use it.
//
// What must stay true: answers follow OpenAI's documentation (the contract test validates
// every answer against the published document); where the documentation is silent, the
// simulator chooses the answer that is harder to handle, and a comment at the code says so.
//
// Choices where the documentation is silent:
//
//   - A request is checked in this order: route, method, rate limit, fault,
//     authentication, permission, query, body, existence. A 429 therefore never uses up a
//     fault, and a key without the permission gets 403 for objects that do not exist.
//   - A key expires at its expires_at, which is the second of its creation plus
//     expires_in_seconds: up to one second early, never late.
//   - An expired key stays listed, with its expires_at in the past, until it is deleted;
//     it can be deleted but not updated.
//   - A list without owner_project_access omits keys whose owner has no access to the
//     project (accounts with role "none").
//   - A page cursor keeps its place after its object was deleted; one that was never in
//     that list is a 400.
//   - All calls in an archived project, including reads and deletes, get 400
//     project_archived; only the project itself can be read.
//   - Unknown query parameters are rejected like unknown body fields.
//   - Scopes are stored as given, but a scope that is not dotted lower-case words is
//     rejected by name.
//   - Admin keys created over HTTP have all permissions, except after SetNewAdminKeys.
package openaitest
