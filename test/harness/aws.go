package harness

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/smallstep/pkcs7"
)

// AWS stands in for what of AWS an instance and a server see: IMDSv2, and the
// APIs of EC2, IAM and STS. Documents have AWS's form and real signatures, by a
// certificate of the test's own.
type AWS struct {
	Certificate string // PEM file of it, for the configuration

	cert *x509.Certificate
	key  *rsa.PrivateKey

	cloudFaults

	mu       sync.Mutex
	instance EC2Instance
	keys     map[string]aws.Credentials // those that the APIs know, by ID
	asked    []string                   // of the APIs, in order
}

// EC2Instance is one.
type EC2Instance struct {
	Account, Region, ID string
	Started             time.Time
	State               string // "": running
	Tags                map[string]string
	Groups              [][2]string // ID and name
	Profile             string      // name of its instance profile; its role has the same
	Moved               time.Duration
}

// NewAWS makes it, with an instance.
func NewAWS(t testing.TB, i EC2Instance) *AWS {
	t.Helper()
	a := &AWS{instance: i, keys: make(map[string]aws.Credentials)}
	a.cert, a.key = SignerCertificate(t, time.Now().Add(-time.Hour), time.Now().Add(24*time.Hour), 2048)
	dir := shortDir(t)
	must(t, os.Chmod(dir, 0o755))
	a.Certificate = filepath.Join(dir, "region.pem")
	must(t, os.WriteFile(a.Certificate, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: a.cert.Raw}), 0o644))
	return a
}

// SignerCertificate makes a certificate as AWS has for its documents: self-signed,
// with an RSA key.
func SignerCertificate(t testing.TB, from, until time.Time, bits int) (*x509.Certificate, *rsa.PrivateKey) {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	must(t, err)
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	must(t, err)
	template := &x509.Certificate{
		SerialNumber: serial, NotBefore: from, NotAfter: until,
		Subject:  pkix.Name{Country: []string{"US"}, Province: []string{"Washington State"}, Locality: []string{"Seattle"}, Organization: []string{"Amazon Web Services LLC"}},
		KeyUsage: x509.KeyUsageDigitalSignature, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	return cert, key
}

// Set changes the instance.
func (a *AWS) Set(i EC2Instance) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.instance = i
}

// Key makes credentials that the APIs know.
func (a *AWS) Key(id, secret string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.keys[id] = aws.Credentials{AccessKeyID: id, SecretAccessKey: secret}
}

// Asked returns what the APIs were asked, and with whose credentials.
func (a *AWS) Asked() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return append([]string(nil), a.asked...)
}

// Document is the instance's identity document, as IMDS has it.
func (i EC2Instance) Document() string {
	return fmt.Sprintf(`{
  "accountId" : %q,
  "architecture" : "x86_64",
  "availabilityZone" : %q,
  "billingProducts" : null,
  "devpayProductCodes" : null,
  "marketplaceProductCodes" : null,
  "imageId" : "ami-5fb8c835",
  "instanceId" : %q,
  "instanceType" : "t2.micro",
  "kernelId" : null,
  "pendingTime" : %q,
  "privateIp" : "10.158.112.84",
  "ramdiskId" : null,
  "region" : %q,
  "version" : "2017-09-30"
}`, i.Account, i.Region+"a", i.ID, i.Started.UTC().Format(time.RFC3339), i.Region)
}

// Sign signs a document as AWS does.
func (a *AWS) Sign(t testing.TB, doc string) string {
	t.Helper()
	return SignCMS(t, []byte(doc), a.cert, a.key)
}

// SignCMS signs a document with any certificate, which goes with it.
func SignCMS(t testing.TB, doc []byte, cert *x509.Certificate, key *rsa.PrivateKey, more ...*x509.Certificate) string {
	t.Helper()
	signed, err := pkcs7.NewSignedData(doc)
	must(t, err)
	signed.SetDigestAlgorithm(pkcs7.OIDDigestAlgorithmSHA256)
	must(t, signed.AddSigner(cert, key, pkcs7.SignerInfoConfig{}))
	for _, one := range more {
		signed.AddCertificate(one)
	}
	der, err := signed.Finish()
	must(t, err)
	var out strings.Builder
	for text := base64.StdEncoding.EncodeToString(der); text != ""; {
		n := min(76, len(text))
		out.WriteString(text[:n] + "\n")
		text = text[n:]
	}
	return strings.TrimSuffix(out.String(), "\n")
}

// Metadata is the instance's metadata service: IMDSv2 alone.
func (a *AWS) Metadata(t testing.TB) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /latest/api/token", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Aws-Ec2-Metadata-Token-Ttl-Seconds") == "" || r.Header.Get("X-Forwarded-For") != "" {
			http.Error(w, "400 - Bad Request", http.StatusBadRequest)
			return
		}
		io.WriteString(w, "AQAEAsession==")
	})
	get := func(path string, answer func(*http.Request) string) {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, r *http.Request) {
			if r.Header.Get("X-Aws-Ec2-Metadata-Token") != "AQAEAsession==" {
				http.Error(w, "401 - Unauthorized", http.StatusUnauthorized)
				return
			}
			text := answer(r)
			if text == "" {
				http.NotFound(w, r)
				return
			}
			io.WriteString(w, text)
		})
	}
	instance := func() EC2Instance {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.instance
	}
	get("/latest/dynamic/instance-identity/document", func(*http.Request) string { return instance().Document() })
	get("/latest/dynamic/instance-identity/rsa2048", func(*http.Request) string { return a.Sign(t, instance().Document()) })
	get("/latest/meta-data/iam/security-credentials/{$}", func(*http.Request) string { return instance().Profile })
	get("/latest/meta-data/iam/security-credentials/{name}", func(r *http.Request) string {
		if r.PathValue("name") != instance().Profile {
			return ""
		}
		a.Key("ASIAINSTANCE", "secret of the instance")
		out, _ := json.Marshal(map[string]string{
			"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "ASIAINSTANCE", "SecretAccessKey": "secret of the instance",
			"Token": "token of the instance", "Expiration": time.Now().Add(6 * time.Hour).UTC().Format(time.RFC3339),
		})
		return string(out)
	})
	return a.metadata(func(w http.ResponseWriter, r *http.Request) {
		mux.ServeHTTP(w, r)
	})
}

// API is EC2, IAM and STS at one address. Their requests must be signed.
func (a *AWS) API() http.Handler {
	return a.api(func(w http.ResponseWriter, r *http.Request) {
		a.mu.Lock()
		defer a.mu.Unlock()
		body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
		r.Body = io.NopCloser(bytes.NewReader(body))
		refuse := func(code string) {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `<Response><Errors><Error><Code>%s</Code><Message>no</Message></Error></Errors><RequestID>1</RequestID></Response>`, code)
		}
		id := a.signedBy(r, body)
		if err != nil || id == "" || r.ParseForm() != nil {
			refuse("AuthFailure")
			return
		}
		a.asked = append(a.asked, r.Form.Get("Action")+" "+id)
		i := a.instance
		switch r.Form.Get("Action") {
		case "DescribeInstances":
			if r.Form.Get("InstanceId.1") != i.ID {
				refuse("InvalidInstanceID.NotFound")
				return
			}
			io.WriteString(w, i.describe())
		case "GetInstanceProfile":
			fmt.Fprintf(w, `<GetInstanceProfileResponse xmlns="https://iam.amazonaws.com/doc/2010-05-08/"><GetInstanceProfileResult><InstanceProfile>
<InstanceProfileName>%[2]s</InstanceProfileName><Arn>arn:aws:iam::%[1]s:instance-profile/%[2]s</Arn>
<Roles><member><Path>/</Path><Arn>arn:aws:iam::%[1]s:role/%[2]s</Arn><RoleName>%[2]s</RoleName></member></Roles>
</InstanceProfile></GetInstanceProfileResult></GetInstanceProfileResponse>`, i.Account, r.Form.Get("InstanceProfileName"))
		case "AssumeRole":
			name := "ASIA-" + r.Form.Get("RoleArn")
			a.keys[name] = aws.Credentials{AccessKeyID: name, SecretAccessKey: "secret of the role"}
			fmt.Fprintf(w, `<AssumeRoleResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleResult><Credentials>
<AccessKeyId>%s</AccessKeyId><SecretAccessKey>secret of the role</SecretAccessKey><SessionToken>token of the role</SessionToken>
<Expiration>%s</Expiration></Credentials></AssumeRoleResult></AssumeRoleResponse>`, name, time.Now().Add(15*time.Minute).UTC().Format(time.RFC3339))
		default:
			refuse("InvalidAction")
		}
	})
}

// signedBy returns the ID of the credentials that a request is signed with, or "".
func (a *AWS) signedBy(r *http.Request, body []byte) string {
	got := r.Header.Get("Authorization")
	_, rest, ok := strings.Cut(got, "Credential=")
	parts := strings.Split(rest, ",")
	scope := parts[0]
	fields := strings.Split(scope, "/")
	if n := len(fields); !ok || n < 5 {
		return ""
	}
	n := len(fields)
	id, region, service := strings.Join(fields[:n-4], "/"), fields[n-3], fields[n-2]
	known, ok := a.keys[id]
	when, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	if !ok || err != nil {
		return ""
	}
	known.SessionToken = r.Header.Get("X-Amz-Security-Token")
	sum := sha256.Sum256(body)
	again, err := http.NewRequest(r.Method, "http://"+r.Host+r.URL.RequestURI(), bytes.NewReader(body))
	if err != nil {
		return ""
	}
	for _, name := range []string{"Content-Type", "X-Amz-Target"} {
		if value := r.Header.Get(name); value != "" {
			again.Header.Set(name, value)
		}
	}
	again.Header.Set("User-Agent", r.Header.Get("User-Agent"))
	if target := r.Header.Get("X-Amz-Target"); target != "" { // of APIs of the JSON protocol
		again.Header.Set("X-Amz-Target", target)
	}
	if err := v4.NewSigner().SignHTTP(r.Context(), known, again, hex.EncodeToString(sum[:]), service, region, when); err != nil || again.Header.Get("Authorization") != got {
		return ""
	}
	return id
}

func (i EC2Instance) describe() string {
	var tags, groups, profile strings.Builder
	for key, value := range i.Tags {
		fmt.Fprintf(&tags, "<item><key>%s</key><value>%s</value></item>", key, value)
	}
	for _, group := range i.Groups {
		fmt.Fprintf(&groups, "<item><groupId>%s</groupId><groupName>%s</groupName></item>", group[0], group[1])
	}
	if i.Profile != "" {
		fmt.Fprintf(&profile, "<iamInstanceProfile><arn>arn:aws:iam::%s:instance-profile/%s</arn><id>AIPA</id></iamInstanceProfile>", i.Account, i.Profile)
	}
	state := i.State
	if state == "" {
		state = "running"
	}
	at := func(d time.Duration) string { return i.Started.Add(d).UTC().Format("2006-01-02T15:04:05.000Z") }
	return fmt.Sprintf(`<?xml version="1.0" encoding="UTF-8"?>
<DescribeInstancesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/"><requestId>1</requestId><reservationSet><item>
<reservationId>r-1</reservationId><ownerId>%s</ownerId><groupSet/><instancesSet><item><instanceId>%s</instanceId>
<instanceState><code>16</code><name>%s</name></instanceState>
<rootDeviceType>ebs</rootDeviceType><rootDeviceName>/dev/xvda</rootDeviceName>
<blockDeviceMapping><item><deviceName>/dev/xvda</deviceName><ebs><volumeId>vol-1</volumeId><attachTime>%s</attachTime></ebs></item></blockDeviceMapping>
<networkInterfaceSet><item><attachment><deviceIndex>0</deviceIndex><attachTime>%s</attachTime></attachment></item></networkInterfaceSet>
<tagSet>%s</tagSet><groupSet>%s</groupSet>%s</item></instancesSet></item></reservationSet></DescribeInstancesResponse>`,
		i.Account, i.ID, state, at(time.Second+i.Moved), at(0), tags.String(), groups.String(), profile.String())
}
