// Package feed pushes to each agent what it is authorized for, as it changes.
package feed

// Feed serves the push streams of all connected agents.
type Feed struct{}
