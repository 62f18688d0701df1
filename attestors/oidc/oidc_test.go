package oidc_test

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/oidc"
	"github.com/hallmark-id/hallmark/pkg/issuer"
	"github.com/hallmark-id/hallmark/pkg/selector"
	"github.com/hallmark-id/hallmark/test/harness"
)

const audience = "spiffe://example.org/spire/server"

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// plant is the configuration of an issuer of the test's own.
func plant(p *harness.Issuer) oidc.NodeIssuerConfig {
	return oidc.NodeIssuerConfig{IssuerConfig: oidc.IssuerConfig{
		Name: "plant", Config: issuer.Config{Issuer: p.URL, CAPath: p.CA},
		Claims:    map[string]string{"region": "region", "line": "/site/line", "groups": "/groups/*"},
		Condition: `claims.kind == "robot"`,
	}}
}

// claims are those of a good token of it.
func claims(p *harness.Issuer, change map[string]any) map[string]any {
	all := map[string]any{
		"kind": "robot", "serial": "r2-d2", "region": "eu", "site": map[string]any{"line": 7},
		"groups": []any{"weld", true, map[string]any{}, "paint"},
	}
	for name, value := range change {
		all[name] = value
	}
	return p.Claims(audience, all)
}

func server(t testing.TB, issuers ...oidc.NodeIssuerConfig) *oidc.Server {
	t.Helper()
	s, err := oidc.New(oidc.ServerConfig{Issuers: issuers}, oidc.Options{Audience: audience})
	must(t, err)
	return s
}

func payload(t testing.TB, token string) []byte {
	t.Helper()
	b, err := json.Marshal(map[string]string{"token": token})
	must(t, err)
	return b
}

func verify(t testing.TB, s *oidc.Server, payload []byte) (*attestors.Evidence, error) {
	t.Helper()
	return s.Verify(t.Context(), payload, func(context.Context, []byte) ([]byte, error) {
		t.Error("the node is challenged")
		return nil, context.Canceled
	})
}

func TestANodeIsWhatItsTokenSays(t *testing.T) {
	p := harness.NewIssuer(t)
	path := filepath.Join(t.TempDir(), "token")
	must(t, os.WriteFile(path, []byte(p.Sign(t, claims(p, nil))+"\n"), 0o600))
	agent, err := oidc.NewAgent(oidc.AgentConfig{TokenPath: path})
	must(t, err)
	proof, err := agent.Proof(t.Context())
	must(t, err)
	c := plant(p)
	c.FixedClaims, c.AgentPathTemplate = []string{"serial"}, "oidc/plant/{{ .Claims.serial }}"
	e, err := verify(t, server(t, c), proof)
	must(t, err)
	if e.Path != "oidc/plant/r2-d2" || e.CanReattest {
		t.Errorf("got %+v", e)
	}
	want := []string{
		"oidc:claim:groups:paint", "oidc:claim:groups:true", "oidc:claim:groups:weld", "oidc:claim:line:7", "oidc:claim:region:eu",
		"oidc:iss:" + p.URL, "oidc:issuer:plant", "oidc:sub:job-7",
	}
	if got := selector.NewSet(e.Selectors...).Strings(); !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

func TestWithoutATemplateTheSubjectMakesTheName(t *testing.T) {
	p := harness.NewIssuer(t)
	c := plant(p)
	c.Reattest = true
	s := server(t, c)
	e, err := verify(t, s, payload(t, p.Sign(t, claims(p, map[string]any{"sub": "repo:a/b:ref:refs/heads/main"}))))
	must(t, err)
	if sum := sha256.Sum256([]byte("repo:a/b:ref:refs/heads/main")); e.Path != fmt.Sprintf("oidc/plant/%x", sum) || !e.CanReattest {
		t.Errorf("got %+v", e)
	}
}

func TestEachIssuerSpeaksForItsOwnNodes(t *testing.T) {
	one, two := harness.NewIssuer(t), harness.NewIssuer(t)
	second := plant(two)
	second.Name = "mill"
	s := server(t, plant(one), second)
	e, err := verify(t, s, payload(t, two.Sign(t, claims(two, nil))))
	must(t, err)
	if !strings.HasPrefix(e.Path, "oidc/mill/") {
		t.Errorf("got %s", e.Path)
	}
	forged := claims(one, nil)
	if e, err := verify(t, s, payload(t, two.Sign(t, forged))); err == nil {
		t.Errorf("a token of another issuer makes %s", e.Path)
	}
}

func TestOfManyWhoShowOneTokenAtOnceOneIsTheNode(t *testing.T) {
	p := harness.NewIssuer(t)
	s := server(t, plant(p))
	data := payload(t, p.Sign(t, claims(p, map[string]any{"jti": "1"})))
	var taken atomic.Int64
	var wait sync.WaitGroup
	for range 20 {
		wait.Go(func() {
			if _, err := s.Verify(t.Context(), data, nil); err == nil {
				taken.Add(1)
			} else if !errors.Is(err, issuer.ErrUsed) {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	if taken.Load() != 1 {
		t.Errorf("it was taken %d times", taken.Load())
	}
}

func TestTheAgentReadsTheTokenAnewAndSaysWhatIsMissing(t *testing.T) {
	p := harness.NewIssuer(t)
	path := filepath.Join(t.TempDir(), "token")
	agent, err := oidc.NewAgent(oidc.AgentConfig{TokenPath: path})
	must(t, err)
	if _, err := agent.Proof(t.Context()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	for _, sub := range []string{"first", "second"} {
		token := p.Sign(t, claims(p, map[string]any{"sub": sub}))
		must(t, os.WriteFile(path, []byte(token), 0o600))
		proof, err := agent.Proof(t.Context())
		must(t, err)
		if string(proof) != `{"token":"`+token+`"}` {
			t.Errorf("got %s", proof)
		}
	}
	must(t, os.WriteFile(path, []byte("secret"), 0o600))
	if _, err := agent.Proof(t.Context()); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("got %v", err)
	}
	if _, err := agent.Respond(t.Context(), []byte("{}")); err == nil {
		t.Error("a challenge is answered")
	}
	token := p.Sign(t, claims(p, nil))
	t.Setenv("ID_TOKEN", token)
	agent, err = oidc.NewAgent(oidc.AgentConfig{TokenEnv: "ID_TOKEN"})
	must(t, err)
	if proof, err := agent.Proof(t.Context()); err != nil || string(proof) != `{"token":"`+token+`"}` {
		t.Errorf("got %s, %v", proof, err)
	}
	for _, c := range []oidc.AgentConfig{{}, {TokenPath: "token"}, {TokenPath: path, TokenEnv: "X"}} {
		if _, err := oidc.NewAgent(c); err == nil {
			t.Errorf("%+v was taken", c)
		}
	}
}
