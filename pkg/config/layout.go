package config

import "crypto/x509"

// Layout is what the configuration of a program says of the machine it runs on:
// what is to be looked at to find out whether all is well there.
type Layout struct {
	TrustDomain string
	AdminSocket string   // path
	DataDirs    []string // that are the program's alone; they are made when it first runs
	Connections int      // the most at once
	Descriptors int      // that each connection takes

	// Of an agent only.
	Socket      string              // path of the Workload API's
	Server      string              // host:port that it dials
	Authorities []*x509.Certificate // by which it knows its server when it starts; nil: by a join string or not at all
}
