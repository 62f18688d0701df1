package awsiid_test

import (
	"context"
	"encoding/json"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/awsiid"
	"github.com/hallmark-id/hallmark/test/harness"
)

const (
	account = "123456789012"
	region  = "us-west-2"
	id      = "i-1234567890abcdef0"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// started is an instance that was started a minute ago.
func started() harness.EC2Instance {
	return harness.EC2Instance{Account: account, Region: region, ID: id, Started: time.Now().Add(-time.Minute).Truncate(time.Second)}
}

// trusting is a configuration that admits the account of an AWS of the test's own.
func trusting(a *harness.AWS) awsiid.ServerConfig {
	return awsiid.ServerConfig{
		AccountAllowList: []string{account},
		Certificates:     []awsiid.RegionCertificate{{Region: region, Path: a.Certificate}},
	}
}

func newServer(t testing.TB, c awsiid.ServerConfig, o awsiid.Options) *awsiid.Server {
	t.Helper()
	s, err := awsiid.New(c, o)
	must(t, err)
	return s
}

func newAgent(t testing.TB, a *harness.AWS) *awsiid.Agent {
	t.Helper()
	service := httptest.NewServer(a.Metadata(t))
	t.Cleanup(service.Close)
	agent, err := awsiid.NewAgent(awsiid.AgentConfig{MetadataAddress: service.URL})
	must(t, err)
	return agent
}

// payload is what a node sends.
func payload(t testing.TB, document, rsa2048 string) []byte {
	t.Helper()
	data, err := json.Marshal(map[string]string{"document": document, "rsa2048": rsa2048})
	must(t, err)
	return data
}

// unasked fails the test if a node is challenged.
func unasked(t testing.TB) func(context.Context, []byte) ([]byte, error) {
	return func(context.Context, []byte) ([]byte, error) {
		t.Error("the node is challenged")
		return nil, context.Canceled
	}
}

// values are the selectors of an evidence.
func values(e *attestors.Evidence) []string {
	var out []string
	for _, s := range e.Selectors {
		out = append(out, s.String())
	}
	slices.Sort(out)
	return out
}
