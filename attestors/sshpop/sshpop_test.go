package sshpop_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/hallmark-id/hallmark/attestors"
	"github.com/hallmark-id/hallmark/attestors/sshpop"
)

func parseCert(t testing.TB, c sshpop.AgentConfig) *ssh.Certificate {
	t.Helper()
	path := c.HostCertPath
	if path == "" {
		path = c.HostKeyPath + "-cert.pub"
	}
	key, _, _, _, err := ssh.ParseAuthorizedKey(read(t, path))
	if err != nil {
		t.Fatal(err)
	}
	return key.(*ssh.Certificate)
}

func TestAHostAttestsByWhatSSHKeygenMade(t *testing.T) {
	for _, ca := range []string{"ed25519", "ecdsa", "rsa"} {
		path := authority(t, ca)
		s := newServer(t, sshpop.ServerConfig{CertAuthorities: []string{string(read(t, path+".pub"))}})
		for _, kind := range []string{"ed25519", "ecdsa", "rsa"} {
			t.Run(kind+" of "+ca, func(t *testing.T) {
				c := host(t, path, kind)
				evidence := mustAttest(t, s, sshpop.NewAgent(c))
				cert := parseCert(t, c)
				if want := "sshpop/" + fingerprint(cert); evidence.Path != want || !evidence.CanReattest {
					t.Errorf("evidence is %+v, want the path %s, again and again", evidence, want)
				}
				want := []string{"sshpop:ca:fingerprint:" + fingerprint(cert.SignatureKey), "sshpop:principal:10.0.0.1", "sshpop:principal:host-1.example.org"}
				if got := values(evidence); !slices.Equal(got, want) {
					t.Errorf("selectors are %q, want %q", got, want)
				}
			})
		}
	}
}

func TestTheKeysThatSSHDMakesForItselfWillDo(t *testing.T) {
	root, ca := t.TempDir(), authority(t, "ed25519")
	dir := filepath.Join(root, "etc/ssh")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	keygen(t, "-A", "-f", root) // as a host does when it first starts
	s := newServer(t, sshpop.ServerConfig{CertAuthoritiesPath: ca + ".pub"})
	keys, err := filepath.Glob(filepath.Join(dir, "ssh_host_*_key"))
	if err != nil || len(keys) < 3 {
		t.Fatalf("ssh-keygen -A made %q: %v", keys, err)
	}
	for _, key := range keys {
		keygen(t, "-s", ca, "-h", "-I", "host", "-n", "host-1", "-V", "20270301110000:20270301130000", key+".pub")
		mustAttest(t, s, sshpop.NewAgent(sshpop.AgentConfig{HostKeyPath: key}))
	}
}

func TestAnAgentOfSPIREThatSignsWithSHA1IsUnderstood(t *testing.T) {
	ca, key := ed(t), rsaKey(t, 2048)
	cert := certify(t, ca, key.PublicKey(), nil)
	evidence, err := trusting(t, ca.PublicKey()).Verify(t.Context(), payload(t, cert.Marshal()), answering(t, func(c []byte) []byte {
		a := respond(t, key, c)
		if a.Signature.Format != "ssh-rsa" {
			t.Fatalf("signature is %s", a.Signature.Format)
		}
		return a.bytes(t)
	}))
	if err != nil || evidence.Path != "sshpop/"+fingerprint(cert) {
		t.Errorf("evidence is %+v: %v", evidence, err)
	}
}

func TestAnAgentIsNamedByATemplate(t *testing.T) {
	ca := authority(t, "ed25519")
	c := host(t, ca, "ed25519")
	for template, want := range map[string]string{
		"sshpop/{{ .Hostname }}":                           "sshpop/host-1",
		"/sshpop/{{ index .ValidPrincipals 0 }}":           "sshpop/host-1.example.org",
		"{{ .PluginName }}/{{ .KeyId | replace ` ` `-` }}": "sshpop/the-host",
		"sshpop/{{ .Serial }}":                             "sshpop/7",
	} {
		s := newServer(t, sshpop.ServerConfig{CertAuthoritiesPath: ca + ".pub", CanonicalDomain: "example.org", AgentPathTemplate: template})
		if evidence := mustAttest(t, s, sshpop.NewAgent(c)); evidence.Path != want {
			t.Errorf("%s: path is %s, want %s", template, evidence.Path, want)
		}
	}
}

func TestAHostOutsideOfTheDomainIsRefused(t *testing.T) {
	ca := ed(t)
	s := newServer(t, sshpop.ServerConfig{CertAuthorities: []string{line(ca.PublicKey())}, CanonicalDomain: "example.org"})
	for _, name := range []string{"host-1", "host-1.example.com", "host-1.badexample.org", "example.org", ".example.org", "host-1.example.org."} {
		cert := certify(t, ca, ed(t).PublicKey(), func(c *ssh.Certificate) { c.ValidPrincipals = []string{name, "host-1.example.org"} })
		if _, err := s.Verify(t.Context(), payload(t, cert.Marshal()), unasked(t)); err == nil || !strings.Contains(err.Error(), "not in the domain example.org") {
			t.Errorf("%q: got %v", name, err)
		}
	}
}

func TestAChangedFileOfAuthoritiesCountsAtOnce(t *testing.T) {
	one, two := ed(t), ed(t)
	path := write(t, filepath.Join(t.TempDir(), "authorities"), []byte("# ours\n\n"+line(one.PublicKey())))
	s := newServer(t, sshpop.ServerConfig{CertAuthoritiesPath: path})
	admitted := func(want ...bool) {
		t.Helper()
		for i, ca := range []ssh.Signer{one, two} {
			key := ed(t)
			_, err := s.Verify(t.Context(), payload(t, certify(t, ca, key.PublicKey(), nil).Marshal()),
				answering(t, func(c []byte) []byte { return respond(t, key, c).bytes(t) }))
			if (err == nil) != want[i] {
				t.Errorf("authority %d: %v", i+1, err)
			}
		}
	}
	admitted(true, false)
	write(t, path, []byte(line(one.PublicKey())+line(two.PublicKey())))
	admitted(true, true)
	write(t, path, []byte(line(two.PublicKey())))
	admitted(false, true)

	cert := payload(t, certify(t, two, ed(t).PublicKey(), nil).Marshal())
	for name, data := range map[string]string{"empty": "", "half": line(two.PublicKey())[:40], "one, a half": line(two.PublicKey()) + line(one.PublicKey())[:40]} {
		write(t, path, []byte(data))
		if _, err := s.Verify(t.Context(), cert, unasked(t)); !errors.Is(err, attestors.ErrUnavailable) || strings.Contains(err.Error(), path) {
			t.Errorf("%s: got %v, want that it cannot be checked now, and no path", name, err)
		}
	}
}

func TestTheClockOfTheServerCounts(t *testing.T) {
	ca := authority(t, "ed25519")
	agent := sshpop.NewAgent(host(t, ca, "ed25519"))
	for when, want := range map[time.Time]bool{
		now:                                      true,
		now.Add(59 * time.Minute):                true,
		now.Add(61 * time.Minute):                false,
		now.Add(-61 * time.Minute):               false,
		now.Add(100000 * time.Hour):              false,
		time.Unix(-1, 0):                         false,
		time.Date(1, 1, 1, 0, 0, 0, 0, time.UTC): false,
	} {
		s, err := sshpop.New(sshpop.ServerConfig{CertAuthoritiesPath: ca + ".pub"}, sshpop.Options{Now: at(when)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := attest(t, s, agent); (err == nil) != want {
			t.Errorf("at %v: %v", when, err)
		}
	}
}

func TestARenewedCertificateIsPickedUp(t *testing.T) {
	ca := authority(t, "ed25519")
	s := newServer(t, sshpop.ServerConfig{CertAuthoritiesPath: ca + ".pub", AgentPathTemplate: "sshpop/{{ .Hostname }}"})
	c := host(t, ca, "ed25519")
	agent := sshpop.NewAgent(c)
	if evidence := mustAttest(t, s, agent); evidence.Path != "sshpop/host-1.example.org" {
		t.Errorf("path is %s", evidence.Path)
	}
	keygen(t, "-s", ca, "-h", "-I", "host", "-n", "host-2", "-V", "20270301110000:20270301130000", c.HostKeyPath+".pub")
	if evidence := mustAttest(t, s, agent); evidence.Path != "sshpop/host-2" {
		t.Errorf("path is %s", evidence.Path)
	}
}

func TestAnAgentSaysWhichFileIsWrong(t *testing.T) {
	ca := authority(t, "ed25519")
	good, other := host(t, ca, "ed25519"), host(t, ca, "ecdsa")
	user := host(t, ca, "ed25519")
	keygen(t, "-s", ca, "-I", "user", "-n", "root", user.HostKeyPath+".pub")
	nameless := host(t, ca, "ed25519")
	keygen(t, "-s", ca, "-h", "-I", "host", nameless.HostKeyPath+".pub")
	secret := filepath.Join(t.TempDir(), "secret")
	keygen(t, "-t", "ed25519", "-N", "passphrase", "-f", secret)
	weak := host(t, ca, "rsa")
	write(t, weak.HostKeyPath+"-cert.pub", []byte(line(certify(t, ed(t), rsaKey(t, 1024).PublicKey(), nil))))

	for name, c := range map[string]struct {
		config sshpop.AgentConfig
		want   string
	}{
		"no key":               {sshpop.AgentConfig{HostKeyPath: "/no", HostCertPath: good.HostKeyPath + "-cert.pub"}, "/no: no such file"},
		"no certificate":       {sshpop.AgentConfig{HostKeyPath: good.HostKeyPath, HostCertPath: "/no"}, "/no: no such file"},
		"neither":              {sshpop.AgentConfig{HostKeyPath: "/no"}, "/no-cert.pub: no such file"},
		"another's":            {sshpop.AgentConfig{HostKeyPath: good.HostKeyPath, HostCertPath: other.HostKeyPath + "-cert.pub"}, "is not of the key in"},
		"a bare key":           {sshpop.AgentConfig{HostKeyPath: good.HostKeyPath, HostCertPath: good.HostKeyPath + ".pub"}, "holds a bare key"},
		"a user's certificate": {user, "not that of a host"},
		"no host name":         {nameless, "names no host"},
		"an encrypted key":     {sshpop.AgentConfig{HostKeyPath: secret, HostCertPath: good.HostKeyPath + "-cert.pub"}, "is encrypted"},
		"the public key":       {sshpop.AgentConfig{HostKeyPath: good.HostKeyPath + ".pub", HostCertPath: good.HostKeyPath + "-cert.pub"}, "no SSH private key"},
		"a weak key":           {weak, "1024 bits"},
		"a directory":          {sshpop.AgentConfig{HostKeyPath: t.TempDir(), HostCertPath: good.HostKeyPath + "-cert.pub"}, "no regular file"},
	} {
		_, err := sshpop.NewAgent(c.config).Proof(t.Context())
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}

func TestAnAgentAnswersOneChallengeAProof(t *testing.T) {
	ca := authority(t, "ed25519")
	agent := sshpop.NewAgent(host(t, ca, "ed25519"))
	challenge := []byte(fmt.Sprintf(`{"Nonce": %q}`, "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="))
	if _, err := agent.Respond(t.Context(), challenge); err == nil {
		t.Error("a challenge without a proof is answered")
	}
	if _, err := agent.Proof(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := agent.Respond(t.Context(), challenge); err != nil {
		t.Error(err)
	}
	if _, err := agent.Respond(t.Context(), challenge); err == nil {
		t.Error("a second challenge is answered")
	}
	for _, bad := range []string{"", "null", "{}", `{"Nonce": "AAAA"}`, `{"Nonce": ""}`, "[]", string(challenge) + "x", string(challenge) + strings.Repeat(" ", 4096)} {
		if _, err := agent.Proof(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := agent.Respond(t.Context(), []byte(bad)); err == nil {
			t.Errorf("%.40q is answered", bad)
		}
	}
}

func TestAContradictoryConfigurationIsRefused(t *testing.T) {
	good := line(ed(t).PublicKey())
	empty := write(t, filepath.Join(t.TempDir(), "empty"), []byte("# none\n"))
	for name, c := range map[string]struct {
		config sshpop.ServerConfig
		want   string
	}{
		"nothing":              {sshpop.ServerConfig{}, "cert_authorities is missing"},
		"no key":               {sshpop.ServerConfig{CertAuthorities: []string{good, "ssh-ed25519"}}, "cert_authorities: number 2: line 1 is no public key"},
		"an empty one":         {sshpop.ServerConfig{CertAuthorities: []string{""}}, "number 1: no public key in it"},
		"a weak one":           {sshpop.ServerConfig{CertAuthorities: []string{line(rsaKey(t, 1024).PublicKey())}}, "1024 bits"},
		"one with options":     {sshpop.ServerConfig{CertAuthorities: []string{"cert-authority,principals=\"x\" " + good}}, "has options"},
		"a certificate":        {sshpop.ServerConfig{CertAuthorities: []string{line(certify(t, ed(t), ed(t).PublicKey(), nil))}}, "is not supported"},
		"no such file":         {sshpop.ServerConfig{CertAuthoritiesPath: "/no"}, "/no: no such file"},
		"an empty file":        {sshpop.ServerConfig{CertAuthorities: []string{good}, CertAuthoritiesPath: empty}, "no public key in it"},
		"a dot":                {sshpop.ServerConfig{CertAuthorities: []string{good}, CanonicalDomain: "."}, "canonical_domain"},
		"another's path":       {sshpop.ServerConfig{CertAuthorities: []string{good}, AgentPathTemplate: "static/{{ .Hostname }}"}, "does not begin with sshpop/"},
		"a field there is not": {sshpop.ServerConfig{CertAuthorities: []string{good}, AgentPathTemplate: "sshpop/{{ .Host }}"}, "Host"},
	} {
		_, err := sshpop.New(c.config, sshpop.Options{})
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: error is %v, want one with %q", name, err, c.want)
		}
	}
}
