package test

import (
	"context"
	"errors"
	"fmt"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hallmark-id/hallmark/test/harness"
)

// TestAServerGoesOnWithoutItsKeysAndSignsWhenTheyAreBack takes the TPM or the key
// service of a server away, and brings it back.
func TestAServerGoesOnWithoutItsKeysAndSignsWhenTheyAreBack(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	type place struct {
		uri        string
		env        []string
		away, back func()
	}
	for name, make := range map[string]func(t *testing.T) place{
		"TPM": func(t *testing.T) place {
			tpm := harness.NewTPMMaker(t).NewTPM(t)
			return place{
				uri:  "tpmkms:device=" + tpm.Socket,
				away: func() { tpm.TakeAway(t) }, back: func() { tpm.BringBack(t) },
			}
		},
		"AWS KMS": func(t *testing.T) place {
			aws, ring := harness.NewAWS(t, harness.EC2Instance{}), harness.NewKeyRing(nil)
			aws.Key("AKIDSERVER", "SecretOfTheServer")
			api := httptest.NewServer(aws.KMS(ring))
			t.Cleanup(api.Close)
			return place{
				uri:  "awskms:region=us-east-1;endpoint=" + api.URL,
				env:  []string{"AWS_ACCESS_KEY_ID=AKIDSERVER", "AWS_SECRET_ACCESS_KEY=SecretOfTheServer"},
				away: ring.Down, back: ring.Up,
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := make(t)
			d := harness.NewDomain(t, harness.Settings{Server: fmt.Sprintf("keys: {kms: {uri: '%s'}}\n", p.uri), ServerEnv: p.env})
			d.StartServer(t)
			d.StartAgent(t, d.Join(t))
			d.Entry(t, "/echo", echoUID)
			fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
			if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
				t.Errorf("fetch x509 printed:\n%s", out)
			}
			mint := harness.Command{Args: []string{"svid", "mint", "jwt", "--spiffe-id", "/x", "--audience", "a", "--admin-socket", d.AdminSocket}, UID: harness.ServerUID}
			mint.Run(t)

			p.away()
			if out, errOut, code := mint.Try(t); code == 0 || !strings.Contains(errOut, "keys of the authorities cannot be used now") {
				t.Errorf("without its keys it minted:\n%s%s", out, errOut)
			}
			health := harness.Command{Args: []string{"server", "health", "--admin-socket", d.AdminSocket}, UID: harness.ServerUID}
			if out, _, code := health.Try(t); code == 0 || !strings.Contains(out, "not serving") || !strings.Contains(out, "cannot be used now") {
				t.Errorf("without its keys server health printed:\n%s", out)
			}
			d.Admin(t, "entry", "list") // what takes no key goes on
			if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
				t.Errorf("without the server's keys fetch x509 printed:\n%s", out)
			}

			p.back()
			harness.Eventually(t, "be well again", func(context.Context) error {
				if out, _, code := health.Try(t); code != 0 {
					return errors.New(out)
				}
				return nil
			})
			mint.Run(t)
			if strings.Contains(d.Server.Stderr(), "SecretOfTheServer") {
				t.Error("the server's log has the secret of its credentials")
			}

			before := d.Admin(t, "authority", "list")
			if code := d.Server.Stop(t); code != 0 {
				t.Errorf("the server ended with %d", code)
			}
			d.StartServer(t)
			if after := d.Admin(t, "authority", "list"); strings.Count(after, "old") != strings.Count(before, "old") {
				t.Errorf("its keys were not found again:\n%s\n%s", before, after)
			}
		})
	}
}

// TestTheKeyOfAnAgentStaysInItsTPM renews and restarts an agent whose key is in a
// TPM, takes that away, and runs a copy of its directory on another machine.
func TestTheKeyOfAnAgentStaysInItsTPM(t *testing.T) {
	t.Parallel()
	harness.NeedRoot(t)
	maker := harness.NewTPMMaker(t)
	tpm, other := maker.NewTPM(t), maker.NewTPM(t)
	d := harness.NewDomain(t, harness.Settings{Agent: fmt.Sprintf("node_key: {tpm: {tpm_device_path: %s}}\n", tpm.Socket)})
	d.StartServer(t)
	d.StartAgent(t, d.Join(t))
	d.Entry(t, "/echo", echoUID)
	fetch := harness.Command{Args: []string{"fetch", "x509", "--socket", d.Socket}, UID: echoUID}
	serves := func(when string) {
		t.Helper()
		if out := fetch.Run(t); !strings.Contains(out, "spiffe://example.org/echo") {
			t.Errorf("%s fetch x509 printed:\n%s", when, out)
		}
	}
	serves("at first")
	file := filepath.Join(d.Dir, "agent", "data", "agent.pem")
	read := func() string {
		t.Helper()
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	first := read()
	if !strings.Contains(first, "BEGIN TSS2 PRIVATE KEY") || strings.Contains(first, "BEGIN PRIVATE KEY") {
		t.Errorf("on disk is:\n%s", first)
	}

	old := only(t, authorities(t, d, "x509", "active")).ID
	d.Admin(t, "authority", "rotate", "x509")
	d.Admin(t, "authority", "taint", "x509", old, "--yes")
	harness.Eventually(t, "a renewed identity", func(context.Context) error {
		if read() == first {
			return errors.New("it is the first one")
		}
		return nil
	})
	renewed := read()
	if !strings.Contains(renewed, "BEGIN TSS2 PRIVATE KEY") || renewed[:300] == first[:300] {
		t.Errorf("renewed, on disk is:\n%s", renewed)
	}
	d.Agent.Stop(t)
	d.StartAgent(t, "")
	serves("after a restart")

	tpm.TakeAway(t)
	serves("without the TPM")
	d.Agent.Stop(t)
	args := []string{"agent", "run", "-c", filepath.Join(d.Dir, "agent.yaml")}
	expectEnd := func(args []string, want ...string) {
		t.Helper()
		_, errOut, code := harness.Command{Args: args, UID: harness.AgentUID}.Try(t)
		for _, text := range want {
			if code == 0 || !strings.Contains(errOut, text) {
				t.Errorf("it ended with %d, without %q:\n%s", code, text, errOut)
			}
		}
	}
	expectEnd(args, "open the TPM", "the identity stays as it is", "when the TPM is back")
	if read() != renewed {
		t.Error("without its TPM the agent has changed its identity on disk")
	}

	// Another machine with the same files.
	config, err := os.ReadFile(filepath.Join(d.Dir, "agent.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	elsewhere := filepath.Join(d.Dir, "elsewhere.yaml")
	if err := os.WriteFile(elsewhere, []byte(strings.ReplaceAll(string(config), tpm.Socket, other.Socket)), 0o644); err != nil {
		t.Fatal(err)
	}
	expectEnd([]string{"agent", "run", "-c", elsewhere}, "cannot be used on this machine", "of another TPM", "attest this machine anew")
	if read() != renewed {
		t.Error("with another TPM the agent has changed the identity on disk")
	}

	tpm.BringBack(t)
	d.StartAgent(t, "")
	serves("with its TPM again")
}
